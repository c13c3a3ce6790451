"""What an exam of classes asks: prompts of each that no training saw, and prompts outside of all.

A table of classes: what a model draws of each, before and after.

Pictures of classes at each checkpoint: a row for each class, what was drawn before beside what is drawn now.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor

from configs.values import Strict
from stages.classes import OUTSIDE_LABEL, ClassFile, class_prompts, outside_prompts
from stages.classes.photographs import list_photographs
from stages.evaluate.metrics import Scorer, compute_fidelity
from stages.evaluate.paired import relative_errors
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource
from stages.sampling.grids import fixed_noises, make_sheet, save_sheet
from stages.sampling.sampler import Sampler, sample_student, sample_teacher
from stages.system.atomic import atomic_write
from stages.system.terminal import console


def exam_prompts(
    source: PromptSource, seed: int, classes: ClassFile, pictures_per_class: int
) -> Mapping[str, Sequence[Prompt]]:
    """So many prompts of each class, and outside of all where there are any; photographs are asked for what they show.

    Raises `Refused` naming a class that has too few.
    """
    asked = {spec.name: pictures_per_class if spec.has_prompts else 0 for spec in classes.classes}
    found = class_prompts(source, seed, "validation", classes, asked)
    for spec in classes.classes:
        if not spec.has_prompts:
            found[spec.name] = list(islice(cycle(list_photographs(spec)), pictures_per_class))
    outside = outside_prompts(source, seed, "validation", classes, pictures_per_class)
    return {**found, OUTSIDE_LABEL: outside} if outside else found


ALL_SHOWN = "all"
"""The share of pictures that show all that was said."""

MetricsByModel = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Model -> class -> quantity -> value."""


class ExamConfig(Strict):
    """How each class is measured: with the same prompts and noises for every model."""

    pictures: int = Field(100, ge=1, description="held-out prompts asked of each class, before and after")
    checkpoint_pictures: int = Field(
        16, ge=1, description="the first of them, asked at each checkpoint: few, so one is worth many points"
    )
    seed: int = Field(7, description="seed of the fixed noises")
    sampler: Sampler = Field(Sampler(), description="how the pictures are drawn")


class Exam:
    """Fixed prompts and noises of each class, asked of one student after the other; the teacher draws them once."""

    def __init__(
        self,
        teacher: Teacher,
        prompts: Mapping[str, Sequence[Prompt]],
        scorer: Scorer | None,
        config: ExamConfig,
        pictures: int | None = None,
    ) -> None:
        """The first `pictures` of each class are asked, or all."""
        self.teacher, self.scorer, self.config = teacher, scorer, config
        self.texts = {name: [prompt.text for prompt in asked[:pictures]] for name, asked in prompts.items()}
        self._teacher_latents: dict[str, Tensor] = {}

    def __call__(self, student: Student) -> dict[str, dict[str, float]]:
        """Class -> paired error against the teacher's picture from the same noise, and what the scorer says."""
        return {name: self._class_metrics(student, name) for name in self.texts}

    def _class_metrics(self, student: Student, name: str) -> dict[str, float]:
        teacher, texts, sampler = self.teacher, self.texts[name], self.config.sampler
        noise = fixed_noises(self.config.seed, len(texts), teacher.components.latent_shape).to(teacher.uncond.device)
        cond = teacher.encode_texts(texts)
        drawn = sample_student(student, cond, teacher.uncond, noise, sampler)
        if name not in self._teacher_latents:
            self._teacher_latents[name] = sample_teacher(teacher, cond, teacher.uncond, noise, sampler)
        found = {"paired_error": float(relative_errors(drawn, self._teacher_latents[name]).mean())}
        if self.scorer is not None:
            said = compute_fidelity(self.scorer, texts, teacher.decode_latents(drawn))
            found |= {ALL_SHOWN: said.all_at_once, **said.by_attribute}
        return found


def save_table(classes: ClassFile, results: MetricsByModel, path: Path) -> None:
    """Write the table as CSV: a row for each class and the rest, a column for each quantity of each model."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    head = [f"{quantity}_{model}" for quantity in quantities(results) for model in results]
    writer.writerow(["class", "priority", *head])
    for name, priority in _class_rows(classes, results):
        row = [f"{results[model][name][q]:.4f}" for q in quantities(results) for model in results]
        writer.writerow([name, priority, *row])
    atomic_write(path, lines.getvalue())


def show_table(classes: ClassFile, results: MetricsByModel) -> None:
    """Print the scorer's overall share (in percent) and the paired error of each row, one column for each model."""
    shown = [quantity for quantity in (ALL_SHOWN, "paired_error") if quantity in quantities(results)]
    table = Table("class", "priority", *(f"{quantity} {model}" for quantity in shown for model in results))
    for name, priority in _class_rows(classes, results):
        cells = [
            f"{100 * results[m][name][q]:.1f} %" if q == ALL_SHOWN else f"{results[m][name][q]:.4f}"
            for q in shown
            for m in results
        ]
        table.add_row(name, priority, *cells)
    console().print(table)


def _class_rows(classes: ClassFile, results: MetricsByModel) -> list[tuple[str, str]]:
    """Everything that was examined, with its priority; what lies outside of all classes has none."""
    priorities = {spec.name: spec.priority for spec in classes.classes}
    return [(name, priorities.get(name, "")) for name in next(iter(results.values()))]


def quantities(results: MetricsByModel) -> list[str]:
    """What was measured, in the order in which it was."""
    return list(next(iter(next(iter(results.values())).values())))


COLUMN_TITLES = ("teacher", "distilled", "finetuned")


def class_grid_hook(
    teacher: Teacher,
    load_distilled: Callable[[], Student],
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
        cond, uncond, sampler = teacher.encode_texts(texts), teacher.uncond, config.sampler
        noise = fixed_noises(config.seed, len(texts), teacher.components.latent_shape).to(cond.device)
        if not before:
            before.append(sample_teacher(teacher, cond, uncond, noise, sampler))
            before.append(sample_student(load_distilled(), cond, uncond, noise, sampler))
        latents = [*before, sample_student(student, cond, uncond, noise, sampler)]
        columns = [teacher.decode_latents(one) for one in latents]
        settings = {"samples": samples, "prompts": texts, **config.model_dump(mode="json")}
        save_sheet(make_sheet(labels, COLUMN_TITLES, columns), path, settings)

    return draw
