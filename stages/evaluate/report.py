"""What an evaluation found, judged by its gates, as a table and as JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from configs.strict import Strict
from stages.evaluate.metrics import Fidelity
from stages.evaluate.paired import PairedError
from stages.train.velocity import RelativeError, VelocityErrors

TEACHER, STUDENT, AS_NOISE = "teacher", "student", "student as a noise model"


class Gates(Strict):
    """What a student must reach, and its controls must not; a gate left out is not judged."""

    attribute_loss: float | None = Field(
        None, ge=0, description="most that any attribute may lose to the teacher, 0 to 1"
    )
    score: dict[int, float] = Field(default_factory=dict, description="steps -> highest paired score, 0 to 1")
    velocity_error: float | None = Field(None, ge=0, description="highest held-out relative squared velocity error")
    guidance_error: float | None = Field(None, ge=0, description="highest such error of the guidance difference")


@dataclass(frozen=True)
class Evaluation:
    """Every figure, by who was measured: the teacher, the student, and the controls that must fail."""

    run: str
    samples: int
    tail: str
    settings: Mapping[str, Any]
    fidelity: Mapping[str, Fidelity]
    paired: Mapping[str, Sequence[PairedError]]
    velocity: VelocityErrors | None


@dataclass(frozen=True)
class Verdict:
    """One gate: what was found and what was asked."""

    name: str
    found: float
    asked: str
    passed: bool


def verdicts(found: Evaluation, gates: Gates) -> list[Verdict]:
    """Every gate that is set, and whether the controls fail where the student must pass."""
    return [*_of_fidelity(found, gates), *_of_scores(found, gates), *_of_velocity(found, gates)]


def _of_fidelity(found: Evaluation, gates: Gates) -> Iterator[Verdict]:
    most = gates.attribute_loss
    if most is None or STUDENT not in found.fidelity:
        return
    teacher, student = found.fidelity[TEACHER].by_attribute, found.fidelity[STUDENT].by_attribute
    for name, share in student.items():
        loss = teacher[name] - share
        yield Verdict(f"{name} lost to the teacher", loss, f"<= {most:g}", loss <= most)
    loss = found.fidelity[TEACHER].all_at_once - found.fidelity[AS_NOISE].all_at_once
    yield Verdict(f"control: {AS_NOISE} loses", loss, f"> {most:g}", loss > most)


def _of_scores(found: Evaluation, gates: Gates) -> Iterator[Verdict]:
    for name, errors in found.paired.items():
        for error in errors:
            most = gates.score.get(error.steps)
            if most is None or error.score is None:
                continue
            if name == STUDENT:
                yield Verdict(f"paired score at {error.steps}", error.score, f"<= {most:g}", error.score <= most)
            else:
                label = f"control: {name} at {error.steps}"
                yield Verdict(label, error.score, f"> {most:g}", error.score > most)


def _of_velocity(found: Evaluation, gates: Gates) -> Iterator[Verdict]:
    if found.velocity is None:
        return
    asked = ((gates.velocity_error, found.velocity.velocity), (gates.guidance_error, found.velocity.guidance))
    for name, (most, error) in zip(("velocity error", "guidance error"), asked, strict=True):
        if most is not None:
            yield Verdict(name, error.overall, f"<= {most:g}", error.overall <= most)


def as_json(found: Evaluation, judged: Sequence[Verdict]) -> str:
    """The same for programs; what is no number is null."""
    content = _finite({**asdict(found), "gates": [asdict(verdict) for verdict in judged]})
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(found: Evaluation, judged: Sequence[Verdict], console: Console) -> None:
    """Print the tables."""
    console.print(f"{found.run} at {found.samples} samples, tail policy {found.tail}")
    tables = [_fidelity_table(found.fidelity), _paired_table(found.paired), _velocity_table(found.velocity)]
    for table in (*tables, _gate_table(judged)):
        if table.row_count:
            console.print(table)


def _fidelity_table(fidelity: Mapping[str, Fidelity]) -> Table:
    names = list(next(iter(fidelity.values())).by_attribute) if fidelity else []
    table = _table("pictures that show what was said, %", "", *names, "all", "pictures")
    for who, shares in fidelity.items():
        cells = [*shares.by_attribute.values(), shares.all_at_once]
        table.add_row(who, *(f"{100 * share:.1f}" for share in cells), str(shares.pictures))
    return table


def _paired_table(paired: Mapping[str, Sequence[PairedError]]) -> Table:
    table = _table("paired-noise error", "", "steps", "error", "floor", "ceiling", "score", "95 %")
    for who, errors in paired.items():
        for e in errors:
            score = "-" if e.score is None else f"{e.score:.3f}"
            between = "-" if e.interval is None else f"{e.interval[0]:.3f} to {e.interval[1]:.3f}"
            table.add_row(who, str(e.steps), f"{e.student:.4f}", f"{e.floor:.4f}", f"{e.ceiling:.4f}", score, between)
    return table


def _velocity_table(velocity: VelocityErrors | None) -> Table:
    bins = len(velocity.velocity.by_bin) if velocity else 0
    heads = [f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins)]
    table = _table("held-out relative squared error", "", "all", *heads)

    def row(name: str, error: RelativeError) -> None:
        cells = (error.overall, *error.by_bin)
        table.add_row(name, *("-" if cell is None else f"{cell:.4f}" for cell in cells))

    if velocity:
        row("velocity", velocity.velocity)
        row("guidance difference", velocity.guidance)
    return table


def _gate_table(judged: Sequence[Verdict]) -> Table:
    table = _table("gates", "", "found", "asked", "")
    for v in judged:
        table.add_row(v.name, f"{v.found:.4f}", v.asked, "PASS" if v.passed else "FAIL")
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right")
    return table
