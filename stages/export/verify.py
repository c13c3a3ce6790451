"""Verification is part of exporting: both formats are read back from the disk and held against what they should be."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.refusal import Refused
from stages.export import checks
from stages.export.content import FILES, Content, teachers_unet, weight_file
from stages.export.scheduler import CONFIG, read_config, written_config
from stages.nets.student import Student


def verify_folder(folder: Path, content: Content) -> None:
    """Raise `Refused` unless the diffusers folder is exactly this content; every file is read again."""
    checks.same_scheduler(str(CONFIG), read_config(folder), written_config(content.scheduler))
    teacher = teachers_unet(content.teacher_folder)
    checks.taught(content.student.unet.state_dict(), teacher)
    for variant, dtype in content.types.items():
        for part in FILES:
            _verify_part(folder, content, part, variant, dtype, teacher if part == "unet" else {})
    del teacher  # 3.4 GB at SD-1.x's size
    for variant, dtype in content.types.items():
        _ask_the_stock_pipeline(folder, content, variant, dtype)


def _verify_part(
    folder: Path, content: Content, part: str, variant: str, dtype: torch.dtype, teacher: Mapping[str, Tensor]
) -> None:
    file = weight_file(part, variant)
    where, found, meant = str(file), read_tensors(folder / file), content.tensors(part, dtype)
    checks.same_names(where, found, meant)
    checks.one_type(where, found, dtype)
    checks.only_numbers(where, found)
    checks.not_the_teachers(where, found, teacher)
    checks.equal(where, found, meant)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; raises `Refused` where it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{file}: cannot be read ({error}) - {checks.AGAIN}") from error


def _ask_the_stock_pipeline(folder: Path, content: Content, variant: str, dtype: torch.dtype) -> None:
    """It must open the folder with the scheduler that lies there, and answer as the student does.

    In fp32, so that any processor can be asked.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(folder, variant=variant or None, dtype=torch.float32)
    name, meant = type(pipeline.scheduler).__name__, type(content.scheduler).__name__
    if name != meant:
        raise Refused(f"{folder.name}: the stock pipeline opens it with {name}, not {meant} - {checks.AGAIN}")
    found = Student(pipeline.unet.eval(), content.student.vp)
    checks.same_velocities(str(weight_file("unet", variant)), found, content.student, dtype)
