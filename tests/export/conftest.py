"""A teacher with random weights, and a student that differs from it in every tensor."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from stages.export import export_all
from stages.export.diffusers import export_diffusers
from stages.export.verify_export import ExportOptions
from stages.nets.student import Student
from stages.tiny import anatomy


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = anatomy.build_tokenizer()
        StableDiffusionPipeline(
            unet=anatomy.build_unet(),
            vae=anatomy.build_vae(),
            text_encoder=anatomy.build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=anatomy.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def distilled(teacher_folder: Path) -> Student:
    student = Student.from_teacher(UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return student.eval()


@pytest.fixture
def student(teacher_folder: Path) -> Student:
    return distilled(teacher_folder)


@pytest.fixture(scope="session")
def exported(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in fp32 that no test may change."""
    out, facts = tmp_path_factory.mktemp("export"), {"samples": 64, "tail": "hold"}
    return export_diffusers(distilled(teacher_folder), teacher_folder, out, facts, ExportOptions(dtype="float32"))


FACTS = {"base_model": "someone/sd-embedded", "tail": "hold", "samples": 64, "recipe_sha256": "ab" * 32}


@pytest.fixture(scope="session")
def whole(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in fp16 with its single file that no test may change."""
    out = tmp_path_factory.mktemp("whole")
    export_all(distilled(teacher_folder), teacher_folder, out, FACTS, ExportOptions(flow_shift=2.5))
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The diffusers folder of the same export, alone and a test's own."""
    return Path(shutil.copytree(whole / "diffusers", tmp_path / "diffusers"))


@pytest.fixture(scope="session")
def single(whole: Path) -> Path:
    """The single file of the same export."""
    return whole / "sd-embedded-flow.safetensors"
