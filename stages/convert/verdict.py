"""What a conversion achieved: paired errors of the polished student, of both starts and of the base's student."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from configs.values import PictureSize
from stages.convert.delta import relative_distance
from stages.convert.starts import BASE, Models, delta_obstacle, load_base_student, make_start
from stages.evaluate.paired import PairedComparison, PairedError, teacher_reference
from stages.evaluate.report import make_table, paired_table
from stages.nets.student import Student
from stages.sampling.fields import student_field
from stages.sampling.sampler import Sampler

POLISHED = "polished"
VERDICT_STEPS = (4, 8, 25)


@dataclass(frozen=True)
class Verdict:
    """Paired errors under the tail policy of the base, and the polished student against each of the others."""

    size: str
    """Of the pictures."""
    prompts: int
    tail: str
    settings: Mapping[str, Any]
    """Seed and sampler."""
    errors: Mapping[str, tuple[PairedError, ...]]
    """By student, at each number of steps; no delta where it has an obstacle."""
    comparisons: Mapping[str, tuple[PairedComparison, ...]]
    """The polished student against each of the others."""

    def tables(self) -> tuple[Table, Table]:
        """Both for the terminal."""
        rows = [
            (f"{POLISHED} - {name}", f"{one.steps}", _text(one.difference), _interval_text(one.difference_interval),
             _text(one.ratio), _interval_text(one.ratio_interval))
            for name, compared in self.comparisons.items()
            for one in compared
        ]  # fmt: skip
        columns = ["", "steps", "score", "95 %", "error ratio", "95 %"]
        where = f" at {self.size}, {self.prompts} prompts, tail policy {self.tail}"
        return paired_table(self.errors, where), make_table("polished against the others", columns, rows)


def measure_verdict(
    models: Models,
    polished: Student,
    texts: Sequence[str],
    seed: int,
    sampler: Sampler,
    size: PictureSize | None = None,
    steps: Sequence[int] = VERDICT_STEPS,
) -> Verdict:
    """Compare four students with the fine-tune on the same noises; three of them are made one after another."""
    size = size or models.size
    distance = relative_distance(models.base_teacher.unet, models.teacher.components.unet)
    students: dict[str, Callable[[], Student]] = {BASE: lambda: load_base_student(models)}
    students["graft"] = lambda: make_start("graft", models).eval()
    if not delta_obstacle(models, distance):
        students["delta"] = lambda: make_start("delta", models).eval()
    students[POLISHED] = lambda: polished
    reference = teacher_reference(models.teacher, texts, seed, sampler, size, steps)
    pictures = {}
    for name, load in students.items():
        field = student_field(load())
        pictures[name] = {n: reference.picture_errors(field, n) for n in steps}
        del field  # before the next student is made
    last = pictures[POLISHED]
    return Verdict(
        size=str(size),
        prompts=len(texts),
        tail=models.base.origin.tail,
        settings={"seed": seed, "sampler": sampler.model_dump(mode="json", exclude={"steps"})},
        errors={name: tuple(reference.summarise(one[n], n) for n in steps) for name, one in pictures.items()},
        comparisons={
            name: tuple(reference.compare_fields(last[n], one[n], n) for n in steps)
            for name, one in pictures.items()
            if name != POLISHED
        },
    )


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
