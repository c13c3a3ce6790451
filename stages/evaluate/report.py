"""What an evaluation found, judged by its gates, as a table and as JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from configs.values import Strict
from stages.evaluate.metrics import Fidelity
from stages.evaluate.paired import PairedError
from stages.train.validation import RelativeError, VelocityErrors

TEACHER, STUDENT, STUDENT_AS_NOISE_MODEL = "teacher", "student", "student as a noise model"


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
class GateResult:
    """One gate: what was found and what was asked."""

    name: str
    found: float
    asked: str
    passed: bool


def check_gates(evaluation: Evaluation, gates: Gates) -> list[GateResult]:
    """Every gate that is set, and whether the controls fail where the student must pass."""
    return [
        *_fidelity_results(evaluation, gates),
        *_score_results(evaluation, gates),
        *_velocity_results(evaluation, gates),
    ]


def _fidelity_results(evaluation: Evaluation, gates: Gates) -> Iterator[GateResult]:
    most = gates.attribute_loss
    if most is None or STUDENT not in evaluation.fidelity:
        return
    teacher, student = evaluation.fidelity[TEACHER].by_attribute, evaluation.fidelity[STUDENT].by_attribute
    for name, share in student.items():
        loss = teacher[name] - share
        yield GateResult(f"{name} lost to the teacher", loss, f"<= {most:g}", loss <= most)
    loss = evaluation.fidelity[TEACHER].all_at_once - evaluation.fidelity[STUDENT_AS_NOISE_MODEL].all_at_once
    yield GateResult(f"control: {STUDENT_AS_NOISE_MODEL} loses", loss, f"> {most:g}", loss > most)


def _score_results(evaluation: Evaluation, gates: Gates) -> Iterator[GateResult]:
    for name, errors in evaluation.paired.items():
        for error in errors:
            most = gates.score.get(error.steps)
            if most is None or error.score is None:
                continue
            if name == STUDENT:
                yield GateResult(f"paired score at {error.steps}", error.score, f"<= {most:g}", error.score <= most)
            else:
                label = f"control: {name} at {error.steps}"
                yield GateResult(label, error.score, f"> {most:g}", error.score > most)


def _velocity_results(evaluation: Evaluation, gates: Gates) -> Iterator[GateResult]:
    if evaluation.velocity is None:
        return
    asked = ((gates.velocity_error, evaluation.velocity.velocity), (gates.guidance_error, evaluation.velocity.guidance))
    for name, (most, error) in zip(("velocity error", "guidance error"), asked, strict=True):
        if most is not None:
            yield GateResult(name, error.overall, f"<= {most:g}", error.overall <= most)


def to_json(evaluation: Evaluation, gate_results: Sequence[GateResult]) -> str:
    """The same for programs; what is no number is null."""
    content = _replace_non_finite({**asdict(evaluation), "gates": [asdict(verdict) for verdict in gate_results]})
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(evaluation: Evaluation, gate_results: Sequence[GateResult], console: Console) -> None:
    """Print the tables."""
    console.print(f"{evaluation.run} at {evaluation.samples} samples, tail policy {evaluation.tail}")
    tables = [
        _fidelity_table(evaluation.fidelity),
        _paired_table(evaluation.paired),
        _velocity_table(evaluation.velocity),
    ]
    for table in (*tables, _gate_table(gate_results)):
        if table.row_count:
            console.print(table)


def _fidelity_table(fidelity: Mapping[str, Fidelity]) -> Table:
    names = list(next(iter(fidelity.values())).by_attribute) if fidelity else []
    table = _make_table("pictures that show what was said, %", "", *names, "all", "pictures")
    for who, shares in fidelity.items():
        cells = [*shares.by_attribute.values(), shares.all_at_once]
        table.add_row(who, *(f"{100 * share:.1f}" for share in cells), str(shares.pictures))
    return table


def _paired_table(paired: Mapping[str, Sequence[PairedError]]) -> Table:
    table = _make_table("paired-noise error", "", "steps", "error", "floor", "ceiling", "score", "95 %")
    for who, errors in paired.items():
        for e in errors:
            score = "-" if e.score is None else f"{e.score:.3f}"
            between = "-" if e.interval is None else f"{e.interval[0]:.3f} to {e.interval[1]:.3f}"
            table.add_row(who, str(e.steps), f"{e.student:.4f}", f"{e.floor:.4f}", f"{e.ceiling:.4f}", score, between)
    return table


def _velocity_table(velocity: VelocityErrors | None) -> Table:
    bins = len(velocity.velocity.by_bin) if velocity else 0
    heads = [f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins)]
    table = _make_table("held-out relative squared error", "", "all", *heads)

    def row(name: str, error: RelativeError) -> None:
        cells = (error.overall, *error.by_bin)
        table.add_row(name, *("-" if cell is None else f"{cell:.4f}" for cell in cells))

    if velocity:
        row("velocity", velocity.velocity)
        row("guidance difference", velocity.guidance)
    return table


def _gate_table(gate_results: Sequence[GateResult]) -> Table:
    table = _make_table("gates", "", "found", "asked", "")
    for v in gate_results:
        table.add_row(v.name, f"{v.found:.4f}", v.asked, "PASS" if v.passed else "FAIL")
    return table


def _make_table(title: str, *column_titles: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, head in enumerate(column_titles):
        table.add_column(head, justify="left" if i == 0 else "right")
    return table
