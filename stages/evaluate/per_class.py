"""A table of classes: what a model draws of each, before and after."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field
from rich.table import Table
from torch import Tensor

from configs.atomic import atomic_write
from configs.strict import Strict
from configs.terminal import console
from stages.classes import ClassFile
from stages.evaluate.grid import fixed_noises
from stages.evaluate.metrics import Scorer, fidelity
from stages.evaluate.paired import relative_errors
from stages.evaluate.sample import Sampler, sample_student, sample_teacher
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt

ALL = "all"
"""The share of pictures that show all that was said."""

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
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
        self._wanted: dict[str, Tensor] = {}

    def __call__(self, student: Student) -> dict[str, dict[str, float]]:
        """Class -> paired error against the teacher's picture from the same noise, and what the scorer says."""
        return {name: self._of_class(student, name) for name in self.texts}

    def _of_class(self, student: Student, name: str) -> dict[str, float]:
        teacher, texts, sampler = self.teacher, self.texts[name], self.config.sampler
        noise = fixed_noises(self.config.seed, len(texts), teacher.parts.latent_shape).to(teacher.uncond.device)
        cond = teacher.encode(texts)
        drawn = sample_student(student, cond, teacher.uncond, noise, sampler)
        if name not in self._wanted:
            self._wanted[name] = sample_teacher(teacher, cond, teacher.uncond, noise, sampler)
        found = {"paired_error": float(relative_errors(drawn, self._wanted[name]).mean())}
        if self.scorer is not None:
            said = fidelity(self.scorer, texts, teacher.decode(drawn))
            found |= {ALL: said.all_at_once, **said.by_attribute}
        return found


def save_table(classes: ClassFile, results: Results, path: Path) -> None:
    """Write the table as CSV: a row for each class and the rest, a column for each quantity of each model."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    head = [f"{quantity}_{model}" for quantity in quantities(results) for model in results]
    writer.writerow(["class", "priority", *head])
    for name, priority in _rows(classes, results):
        row = [f"{results[model][name][q]:.4f}" for q in quantities(results) for model in results]
        writer.writerow([name, priority, *row])
    atomic_write(path, lines.getvalue())


def show_table(classes: ClassFile, results: Results) -> None:
    """Print the scorer's overall share (in percent) and the paired error of each row, one column for each model."""
    shown = [quantity for quantity in (ALL, "paired_error") if quantity in quantities(results)]
    table = Table("class", "priority", *(f"{quantity} {model}" for quantity in shown for model in results))
    for name, priority in _rows(classes, results):
        cells = [
            f"{100 * results[m][name][q]:.1f} %" if q == ALL else f"{results[m][name][q]:.4f}"
            for q in shown
            for m in results
        ]
        table.add_row(name, priority, *cells)
    console().print(table)


def _rows(classes: ClassFile, results: Results) -> list[tuple[str, str]]:
    """Everything that was examined, with its priority; what lies outside of all classes has none."""
    priorities = {spec.name: spec.priority for spec in classes.classes}
    return [(name, priorities.get(name, "")) for name in next(iter(results.values()))]


def quantities(results: Results) -> list[str]:
    """What was measured, in the order in which it was."""
    return list(next(iter(next(iter(results.values())).values())))
