"""Single files that stock diffusers would open in silence although a part of them does not match its config."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages.export.diffusers import export_diffusers
from stages.export.ldm import export_ldm
from stages.nets.student import Student
from stages.sampling.models import load_model
from stages.system.refusal import Refused

Tensors = dict[str, torch.Tensor]
Broken = Callable[[Callable[[Tensors], Tensors]], str]
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student: Student) -> Path:
    facts = {"teacher": "tiny", "tail": "hold", "samples": 1}
    return export_ldm(export_diffusers(student, teacher_folder, tmp_path_factory.mktemp("export"), facts))


@pytest.fixture
def broken(file: Path) -> Broken:
    """broken(change): the message of opening the file with changed tensors."""
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()

    def opened_with(change: Callable[[Tensors], Tensors]) -> str:
        other = file.with_name("broken.safetensors")
        save_file(change(load_file(file)), other, facts)
        with pytest.raises(Refused) as refusal:
            load_model(str(other), "cpu")
        return str(refusal.value)

    return opened_with


def last(tensors: Tensors, part: str) -> str:
    return max(name for name in tensors if name.startswith(PREFIXES[part]) and name.endswith("weight"))


def test_the_file_itself_opens(file: Path) -> None:
    assert load_model(str(file), "cpu").latents.channels == 4


@pytest.mark.parametrize("part", PREFIXES)
def test_a_missing_tensor_is_refused(part: str, broken: Broken) -> None:
    assert "lacks tensors" in broken(lambda held: {k: v for k, v in held.items() if k != last(held, part)})


@pytest.mark.parametrize("part", PREFIXES)
def test_a_value_that_is_not_finite_is_refused(part: str, broken: Broken) -> None:
    def spoil(held: Tensors) -> Tensors:
        held[last(held, part)].view(-1)[0] = float("nan")
        return held

    assert f"{part}: tensor" in broken(spoil)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_tensor_that_the_config_does_not_know_is_refused(part: str, broken: Broken) -> None:
    message = broken(lambda held: {**held, f"{PREFIXES[part]}more.weight": torch.zeros(3)})
    assert f"1 tensors more of the {part}" in message
