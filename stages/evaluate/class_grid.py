"""Pictures of classes at each checkpoint: a row for each class, what was drawn before beside what is drawn now."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from stages.evaluate.grid import fixed_noises, save_sheet, sheet
from stages.evaluate.per_class import ExamConfig
from stages.evaluate.sample import sample_student, sample_teacher
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt

HEADS = ("teacher", "distilled", "finetuned")


def class_grids(
    teacher: Teacher,
    distilled: Callable[[], Student],
    prompts: Mapping[str, Sequence[Prompt]],
    config: ExamConfig,
    folder: Path,
) -> Callable[[int, Student], None]:
    """A function of (samples, student) that draws `<folder>/<samples>.png`: the first prompt of each class.

    `distilled` brings the student that training begins with. A grid that is there already is kept.
    """
    texts = [asked[0].text for asked in prompts.values()]
    labels = [f"{name}: {text}" for name, text in zip(prompts, texts, strict=True)]
    before: list[torch.Tensor] = []

    def draw(samples: int, student: Student) -> None:
        path = folder / f"{samples:09d}.png"
        if path.exists():
            return
        cond, uncond, sampler = teacher.encode(texts), teacher.uncond, config.sampler
        noise = fixed_noises(config.seed, len(texts), teacher.parts.latent_shape).to(cond.device)
        if not before:
            before.append(sample_teacher(teacher, cond, uncond, noise, sampler))
            before.append(sample_student(distilled(), cond, uncond, noise, sampler))
        latents = [*before, sample_student(student, cond, uncond, noise, sampler)]
        columns = [teacher.decode(one) for one in latents]
        settings = {"samples": samples, "prompts": texts, **config.model_dump(mode="json")}
        save_sheet(sheet(labels, HEADS, columns), path, settings)

    return draw
