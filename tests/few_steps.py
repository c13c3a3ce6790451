"""A run folder of a student of few steps near the embedded teacher, as a finished training leaves it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from stages.nets.components import Components, load_components
from stages.nets.graft import graft_time_embedding
from stages.nets.guidance import PROJECTION_KEY, embed_guidance, slow_columns
from stages.nets.run_folder import Origin
from stages.nets.student import Student
from stages.nets.teacher import Teacher

TEACHER = Path("stages/tiny/model")
RANGE = (3.0, 8.0)
SAMPLES = 640


def make_fast_student(parts: Components, noise: float = 2e-3, projection: float = 2e-2) -> Student:
    """The graft of the teacher with noise on every tensor, and a small projection of the guidance scale."""
    student = Student.from_teacher(embed_guidance(parts.unet))
    graft_time_embedding(student.unet, Teacher(parts, "hold").bridge)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.unet.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter += projection * values * slow_columns() if name == PROJECTION_KEY else noise * values
    return student.eval().requires_grad_(False)


def load_teacher(folder: Path = TEACHER) -> Components:
    return load_components(str(folder), torch.device("cpu"), torch.float32)


def make_fast_run(run: Path, windows: int = 4, samples: int = SAMPLES, teacher: Path = TEACHER) -> Student:
    """Write origin, checkpoint and mark of completion into `run`; returns the student."""
    parts = load_teacher(teacher)
    student = make_fast_student(parts)
    checkpoint = run / "checkpoints" / f"{samples:09d}"
    checkpoint.mkdir(parents=True)
    save_file(student.state_dict(), checkpoint / "ema.safetensors")
    assert parts.files is not None
    path = str(teacher.resolve())
    origin = Origin(
        str(teacher),
        dict(parts.files.digests),
        "hold",
        "ab" * 32,
        teacher_path=path,
        windows=windows,
        guidance_range=RANGE,
    )
    origin.save(run)
    (run / "COMPLETE").write_text(f"{samples}\n")
    return student
