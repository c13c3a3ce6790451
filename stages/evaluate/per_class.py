"""A table of classes: what a model draws of each, before and after."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.table import Table

from configs.atomic import atomic_write
from configs.strict import Strict
from stages.classes import ClassFile
from stages.evaluate.grid import fixed_noises
from stages.evaluate.metrics import Scorer, fidelity
from stages.evaluate.paired import relative_errors
from stages.evaluate.sample import Sampler, sample_student, sample_teacher
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Model -> class -> quantity -> value."""


class ExamConfig(Strict):
    """How each class is measured: with the same prompts and noises for every model."""

    pictures: int = Field(100, ge=1, description="held-out prompts asked of each class")
    seed: int = Field(7, description="seed of the fixed noises")
    sampler: Sampler = Field(Sampler(), description="how the pictures are drawn")


def examine(
    student: Student,
    teacher: Teacher,
    prompts: Mapping[str, Sequence[Prompt]],
    scorer: Scorer | None,
    config: ExamConfig,
) -> dict[str, dict[str, float]]:
    """Class -> paired error against the teacher's picture from the same noise, and what the scorer says."""
    found: dict[str, dict[str, float]] = {}
    uncond = teacher.uncond
    for name, asked in prompts.items():
        texts = [prompt.text for prompt in asked]
        noise = fixed_noises(config.seed, len(texts), teacher.parts.latent_shape).to(uncond.device)
        cond = teacher.encode(texts)
        drawn = sample_student(student, cond, uncond, noise, config.sampler)
        wanted = sample_teacher(teacher, cond, uncond, noise, config.sampler)
        found[name] = {"paired_error": float(relative_errors(drawn, wanted).mean())}
        if scorer is not None:
            said = fidelity(scorer, texts, teacher.decode(drawn))
            found[name] |= {"all": said.all_at_once, **said.by_attribute}
    return found


def save_table(classes: ClassFile, results: Results, path: Path) -> None:
    """Write the table as CSV: a row for each class, a column for each quantity of each model."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    head = [f"{quantity}_{model}" for quantity in quantities(results) for model in results]
    writer.writerow(["class", "priority", *head])
    for spec in classes.classes:
        row = [f"{results[model][spec.name][q]:.4f}" for q in quantities(results) for model in results]
        writer.writerow([spec.name, spec.priority, *row])
    atomic_write(path, lines.getvalue())


def show_table(classes: ClassFile, results: Results) -> None:
    """Print the scorer's overall share (in percent) and the paired error of each class, one column for each model."""
    shown = [quantity for quantity in ("all", "paired_error") if quantity in quantities(results)]
    table = Table("class", "priority", *(f"{quantity} {model}" for quantity in shown for model in results))
    for spec in classes.classes:
        cells = [
            f"{100 * results[m][spec.name][q]:.1f} %" if q == "all" else f"{results[m][spec.name][q]:.4f}"
            for q in shown
            for m in results
        ]
        table.add_row(spec.name, spec.priority, *cells)
    Console().print(table)


def quantities(results: Results) -> list[str]:
    """What was measured, in the order in which it was."""
    return list(next(iter(next(iter(results.values())).values())))
