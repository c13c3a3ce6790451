"""Comparison grids of students of few steps, beside the teacher and the students that they come from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from configs.values import PictureSize
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.grids import GridConfig, fixed_noises, make_sheet, save_sheet
from stages.sampling.sampler import Sampler, sample_student, sample_teacher


class Column(NamedTuple):
    """A student beside which others are shown."""

    windows: int | None
    """its steps; None for one that takes as many as the teacher"""
    load: Callable[[], Student]


def window_grid_hook(
    teacher: Teacher,
    config: GridConfig,
    earlier: Sequence[Column],
    windows: int,
    folder: Path,
    sizes: Sequence[PictureSize],
) -> Callable[[int, Student], None]:
    """A function of (samples, student) that writes `<folder>/<samples>.png`, unless the file exists.

    Columns, for each of `sizes`: the teacher, the `earlier` students, which are loaded for the first grid, and the
    student of so many windows.
    """
    native, steps = teacher.components.native_size, config.sampler.steps
    cond, uncond = teacher.encode_texts(config.prompts), teacher.uncond
    students = [f"student {column.windows or steps}" for column in earlier]
    titles = [f"teacher {steps}", *students, f"student {windows}"]
    if len(sizes) > 1:
        titles = [f"{size} {title}" for size in sizes for title in titles]
    fixed: dict[PictureSize, list[Tensor]] = {}

    def sample(student: Student, number: int | None, size: PictureSize) -> Tensor:
        sampler = config.sampler.scaled_to(size, native)
        if number is not None:  # such a student has one solver and one grid of times
            sampler = Sampler(guidance=sampler.guidance, batch_size=sampler.batch_size)
        return sample_student(student, cond, uncond, noises(size), sampler, number)

    def noises(size: PictureSize) -> Tensor:
        shape = teacher.components.latent_shape(size)
        return fixed_noises(config.seed, len(config.prompts), shape).to(cond.device)

    def sample_fixed() -> None:
        for size in sizes:
            sampler = config.sampler.scaled_to(size, native)
            fixed[size] = [sample_teacher(teacher, cond, uncond, noises(size), sampler)]
        for column in earlier:  # one student in memory at a time
            student = column.load()
            for size in sizes:
                fixed[size].append(sample(student, column.windows, size))

    def save_grid(samples: int, student: Student) -> None:
        path = folder / f"{samples:09d}.png"
        if path.exists():
            return
        if not fixed:
            sample_fixed()
        latents = [column for size in sizes for column in (*fixed[size], sample(student, windows, size))]
        sheet = make_sheet(config.prompts, titles, [teacher.decode_latents(column) for column in latents])
        settings = {
            **config.model_dump(mode="json"),
            "windows": windows,
            "rows": list(config.prompts),
            "columns": titles,
        }
        save_sheet(sheet, path, {"samples": samples, **settings})

    return save_grid
