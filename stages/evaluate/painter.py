"""Whatever paints: a run, an exported folder or a teacher, opened by what lies in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from configs.refusal import Refused
from stages.cluster import device_of
from stages.evaluate.fields import Field, student_field, teacher_field
from stages.evaluate.stock import open_stock
from stages.nets.components import check_anatomy, load_components, locate, read_json
from stages.nets.saved import is_run, load_student, load_teacher_parts, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher

Encode: TypeAlias = Callable[[Sequence[str]], Tensor]
Decode: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Painter:
    """Everything between sentences and pictures in [0, 1]."""

    field: Field
    encode: Encode
    decode: Decode
    latent_shape: tuple[int, int, int]
    shift: float = 1.0
    only_euler: bool = False
    """True for a teacher: Euler's method at its own states is DDIM, and it knows no other times."""


def open_painter(location: str, device: str, checkpoint: int | None = None) -> Painter:
    """The model at `location`; its scheduler's prediction type tells a teacher from an exported student.

    Raises `Refused` for what is none of the three.
    """
    where = device_of(device)
    if is_run(Path(location)):
        return _of_run(Path(location), where, checkpoint)
    if checkpoint is not None:
        raise Refused(f"--checkpoint {checkpoint}: {location} is no run folder - leave it out")
    inner = Path(location) / "diffusers"
    folder = inner if inner.is_dir() else locate(location)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("prediction_type") == "flow_prediction":
        check_anatomy(folder)
        return _of_export(open_stock(folder, where), float(scheduler.get("flow_shift", 1.0)))
    return _of_teacher(Teacher(load_components(str(folder), where, torch.float32), "hold"))


def _of_run(folder: Path, device: torch.device, checkpoint: int | None) -> Painter:
    run = open_run(folder, checkpoint)
    parts = load_teacher_parts(run.origin, device, torch.float32)
    teacher = Teacher(parts, run.origin.tail)
    return Painter(student_field(load_student(run, parts)), teacher.encode, teacher.decode, parts.latent_shape)


def _of_teacher(teacher: Teacher) -> Painter:
    field, shape = teacher_field(teacher), teacher.parts.latent_shape
    return Painter(field, teacher.encode, teacher.decode, shape, only_euler=True)


def _of_export(pipeline: StableDiffusionPipeline, shift: float) -> Painter:
    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        cond: Tensor = pipeline.encode_prompt(list(texts), pipeline.device, 1, False)[0]
        return cond

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        decoded: Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    size = pipeline.unet.config.sample_size
    shape = (pipeline.unet.config.in_channels, size, size)
    return Painter(student_field(Student(pipeline.unet)), encode, decode, shape, shift)
