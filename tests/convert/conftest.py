"""A run whose student is the graft of the embedded teacher, a little disturbed, and fine-tunes of that teacher."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from stages.convert.starts import Models
from stages.nets.components import Components, load_components
from stages.nets.features import copy_without_hooks
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import Origin, open_run
from stages.nets.student import Student, Target
from stages.nets.teacher import Teacher

EMBEDDED = Path("stages/tiny/model")
SAMPLES = 64

MakeModels = Callable[..., Models]


def perturbed(unet: UNet2DConditionModel, scale: float, seed: int = 0) -> UNet2DConditionModel:
    """A frozen copy with noise of `scale` times the spread of each tensor."""
    copy = copy_without_hooks(unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in copy.parameters():
            value += scale * value.std(correction=0) * torch.randn(value.shape, generator=generator)
    return copy.eval().requires_grad_(False)


def save_run(folder: Path, student: Student, target: Target = "velocity") -> Path:
    """What distillation writes, as far as a conversion reads it."""
    checkpoint = folder / "checkpoints" / f"{SAMPLES:09d}"
    checkpoint.mkdir(parents=True)
    save_file(student.state_dict(), checkpoint / "ema.safetensors")
    Origin(str(EMBEDDED), {}, "hold", "", target).save(folder)
    return folder


@pytest.fixture(scope="session")
def components() -> Components:
    return load_components(str(EMBEDDED), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def base(components: Components) -> UNet2DConditionModel:
    return components.unet


@pytest.fixture(scope="session")
def grafted(components: Components) -> Student:
    """The base's student."""
    student = Student.from_teacher(components.unet)
    graft_time_embedding(student.unet, Teacher(components, "hold").bridge)
    return Student(perturbed(student.unet, 0.02, seed=5)).eval()


@pytest.fixture(scope="session")
def run_folder(grafted: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("base") / "distill", grafted)


@pytest.fixture(scope="session")
def make_models(components: Components, run_folder: Path) -> MakeModels:
    """make_models(UNet of the fine-tune, other entries of its components): the models of a conversion."""

    def make(unet: UNet2DConditionModel, folder: Path = run_folder, **entries: object) -> Models:
        return Models(open_run(folder), components, Teacher(replace(components, unet=unet, **entries), "hold"))

    return make
