"""The exam of classes: held-out prompts and fixed noises of each class, the same for every model; and its tables."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from pydantic import Field
from rich.table import Table
from torch import Tensor

from configs.values import PictureSize, Strict
from stages.classes.photographs import list_photographs
from stages.classes.selection import OUTSIDE_LABEL, outside_prompts, search_prompts
from stages.classes.specification import ClassFile
from stages.evaluate.metrics import Scorer, compute_fidelity
from stages.evaluate.paired import relative_errors
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler, sample_student, sample_teacher
from stages.system.atomic import atomic_write
from stages.system.terminal import console

ALL_SHOWN = "all"
"""The share of pictures that show every attribute of their prompt."""

MetricsByClass = Mapping[str, Mapping[str, float]]
"""Class -> quantity -> value."""
MetricsByModel = Mapping[str, MetricsByClass]


class ExamConfig(Strict):
    """How each class is measured: with the same prompts and noises for every model."""

    pictures: int = Field(100, ge=1, description="pictures of each class, from held-out prompts, before and after")
    checkpoint_pictures: int = Field(
        16, ge=1, description="the first of them, sampled at each checkpoint: few, so one is worth many points"
    )
    seed: int = Field(7, description="seed of the fixed noises")
    sampler: Sampler = Field(Sampler(), description="how the pictures are sampled")


def exam_prompts(
    source: PromptSource, seed: int, classes: ClassFile, pictures_per_class: int
) -> Mapping[str, Sequence[Prompt]]:
    """Held-out prompts of each class, and outside of all where there are any; of photographs their captions.

    Raises `Refused` naming a class that has too few.
    """
    quotas = {spec.name: pictures_per_class if spec.has_prompts else 0 for spec in classes.classes}
    prompts: dict[str, Sequence[Prompt]] = {**search_prompts(source, seed, "validation", classes, quotas).prompts}
    for spec in classes.classes:
        if not spec.has_prompts:
            prompts[spec.name] = list(islice(cycle(list_photographs(spec)), pictures_per_class))
    outside = outside_prompts(source, seed, "validation", classes, pictures_per_class)
    return {**prompts, OUTSIDE_LABEL: outside} if outside else prompts


class Exam:
    """Measures one student after the other; the teacher's pictures are sampled once."""

    def __init__(
        self,
        teacher: Teacher,
        prompts: Mapping[str, Sequence[Prompt]],
        scorer: Scorer | None,
        config: ExamConfig,
        pictures: int | None = None,
        size: PictureSize | None = None,
    ) -> None:
        """Of the first `pictures` prompts of each class, or of all; pictures of `size`, or of the teacher's own."""
        native = teacher.components.native_size
        self.teacher, self.scorer, self.config, self.size = teacher, scorer, config, size or native
        self._sampler = config.sampler.scaled_to(self.size, native)
        self.texts = {name: [prompt.text for prompt in own[:pictures]] for name, own in prompts.items()}
        self._teacher_latents: dict[str, Tensor] = {}

    def __call__(self, student: Student) -> dict[str, dict[str, float]]:
        """Class -> paired error against the teacher's latents from the same noise, and the scorer's shares."""
        return {name: self._class_metrics(student, name) for name in self.texts}

    def _class_metrics(self, student: Student, name: str) -> dict[str, float]:
        teacher, texts, sampler = self.teacher, self.texts[name], self._sampler
        shape = teacher.components.latent_shape(self.size)
        noise = fixed_noises(self.config.seed, len(texts), shape).to(teacher.uncond.device)
        cond = teacher.encode_texts(texts)
        latents = sample_student(student, cond, teacher.uncond, noise, sampler)
        if name not in self._teacher_latents:
            self._teacher_latents[name] = sample_teacher(teacher, cond, teacher.uncond, noise, sampler)
        metrics = {"paired_error": float(relative_errors(latents, self._teacher_latents[name]).mean())}
        if self.scorer is not None:
            at_once = max(1, len(texts) * teacher.components.native_size.pixels // self.size.pixels)
            pictures = torch.cat([teacher.decode_latents(rows) for rows in latents.split(at_once)])
            fidelity = compute_fidelity(self.scorer, texts, pictures)
            metrics |= {ALL_SHOWN: fidelity.all_at_once, **fidelity.by_attribute}
        return metrics


def save_table(classes: ClassFile, results: MetricsByModel, path: Path) -> None:
    """Write the table as CSV: a row for each class and the rest, a column for each quantity of each model."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    columns = [(quantity, model) for quantity in _quantities(results) for model in results]
    writer.writerow(["class", "priority", *(f"{quantity}_{model}" for quantity, model in columns)])
    for name, priority in _class_rows(classes, results):
        writer.writerow([name, priority, *(f"{results[model][name][quantity]:.4f}" for quantity, model in columns)])
    atomic_write(path, lines.getvalue())


def show_table(classes: ClassFile, results: MetricsByModel) -> None:
    """Print the scorer's overall share (in percent) and the paired error of each row, one column for each model."""
    shown = [quantity for quantity in (ALL_SHOWN, "paired_error") if quantity in _quantities(results)]
    columns = [(quantity, model) for quantity in shown for model in results]
    table = Table("class", "priority", *(f"{quantity} {model}" for quantity, model in columns))
    for name, priority in _class_rows(classes, results):
        values = [(quantity, results[model][name][quantity]) for quantity, model in columns]
        cells = [f"{100 * value:.1f} %" if quantity == ALL_SHOWN else f"{value:.4f}" for quantity, value in values]
        table.add_row(name, priority, *cells)
    console().print(table)


def _class_rows(classes: ClassFile, results: MetricsByModel) -> list[tuple[str, str]]:
    """Every row of the exam with its priority, which is empty for prompts outside all classes."""
    priorities = {spec.name: spec.priority for spec in classes.classes}
    return [(name, priorities.get(name, "")) for name in next(iter(results.values()))]


def _quantities(results: MetricsByModel) -> list[str]:
    return list(next(iter(next(iter(results.values())).values())))
