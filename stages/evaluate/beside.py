"""Pictures at each checkpoint: the teacher beside the student, the same prompts and the same noise every time."""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field

from configs.strict import Strict
from stages.evaluate.grid import fixed_noises, save_sheet, sheet
from stages.evaluate.sample import Sampler, sample_student, sample_teacher
from stages.nets.student import Student
from stages.nets.teacher import Teacher

FEW = 4


class GridConfig(Strict):
    """What the grids show."""

    prompts: tuple[str, ...] = Field(
        ("a photo of a cat", "a red car", "a house by a lake", "a portrait of a woman"),
        min_length=1,
        description="sentences, one row each",
    )
    seed: int = Field(0, description="seed of the fixed noises")
    sampler: Sampler = Field(Sampler(), description="how the pictures are drawn")


def grids_beside(teacher: Teacher, config: GridConfig, folder: Path) -> Callable[[int, Student], None]:
    """A function of (samples, student) that draws `<folder>/<samples>.png`; a grid that is there already is kept."""
    cond, uncond = teacher.encode(config.prompts), teacher.uncond
    noise = fixed_noises(config.seed, len(config.prompts), teacher.parts.latent_shape).to(cond.device)
    few = config.sampler.model_copy(update={"steps": FEW})
    drawn_by_teacher: list[torch.Tensor] = []

    def draw(samples: int, student: Student) -> None:
        path = folder / f"{samples:09d}.png"
        if path.exists():
            return
        if not drawn_by_teacher:
            drawn_by_teacher.append(sample_teacher(teacher, cond, uncond, noise, config.sampler))
        latents = [*drawn_by_teacher, *(sample_student(student, cond, uncond, noise, s) for s in (config.sampler, few))]
        heads = [f"teacher {config.sampler.steps}", f"student {config.sampler.steps}", f"student {FEW}"]
        columns = [teacher.decode(one) for one in latents]
        save_sheet(sheet(config.prompts, heads, columns), path, {"samples": samples, **config.model_dump(mode="json")})

    return draw
