"""An evaluation's metrics and the results of its gates, as tables and as JSON."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from stages.evaluate.distances.columns import Column, Distances, Floor
from stages.evaluate.gates import Gates
from stages.evaluate.metrics import Fidelity
from stages.evaluate.paired import PairedError
from stages.evaluate.straightness import Straightness
from stages.train.validation import VelocityErrors

TEACHER, STUDENT, STUDENT_AS_NOISE_MODEL = "teacher", "student", "student as a noise model"


@dataclass(frozen=True)
class SizeErrors:
    """The student's errors at pictures of one size; empty or None where they were not measured."""

    paired: Sequence[PairedError]
    velocity: float | None
    """Relative squared error at held-out states."""


@dataclass(frozen=True)
class Evaluation:
    """Every metric of the teacher, the student, and the controls that must fail.

    Fidelity is of pictures of the teacher's own size.
    """

    run: str
    samples: int
    tail: str
    settings: Mapping[str, Any]
    fidelity: Mapping[str, Fidelity]
    paired: Mapping[str, Sequence[PairedError]]
    """At pictures of the main size."""
    velocity: VelocityErrors | None
    """At held-out states of all sizes."""
    size: str = ""
    """The main size, to which the gates of paired scores belong: the teacher's own if that was measured."""
    by_size: Mapping[str, SizeErrors] = field(default_factory=dict)
    """The student's errors at each size, the main one too; empty where there is one size alone."""
    straightness: Straightness | None = None
    distances: Distances | None = None
    """Of the pictures whose paired errors are measured, at the main size."""


@dataclass(frozen=True)
class GateResult:
    """One gate: the measured value and its limit."""

    name: str
    found: float
    asked: str
    passed: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> "GateResult":
        """A gate of the student."""
        return cls(name, value, f"<= {limit:g}", value <= limit)

    @classmethod
    def above(cls, name: str, value: float, limit: float) -> "GateResult":
        """A gate of a control, which must miss the student's limit."""
        return cls(f"control: {name}", value, f"> {limit:g}", value > limit)


def check_gates(evaluation: Evaluation, gates: Gates) -> list[GateResult]:
    """Every gate that is set, and whether the controls fail where the student must pass."""
    results, limit, fidelity = list[GateResult](), gates.attribute_loss, evaluation.fidelity
    if limit is not None and STUDENT in fidelity:
        for name, share in fidelity[STUDENT].by_attribute.items():
            loss = fidelity[TEACHER].by_attribute[name] - share
            if math.isnan(loss):  # no sentence names it
                continue
            results.append(GateResult.at_most(f"{name} lost to the teacher", loss, limit))
        loss = fidelity[TEACHER].all_at_once - fidelity[STUDENT_AS_NOISE_MODEL].all_at_once
        results.append(GateResult.above(f"{STUDENT_AS_NOISE_MODEL} loses", loss, limit))
    for name, errors in evaluation.paired.items():
        for error in errors:
            limit = gates.score.get(error.steps)
            if limit is None or error.score is None:
                continue
            if name == STUDENT:
                results.append(GateResult.at_most(f"paired score at {error.steps}", error.score, limit))
            else:
                results.append(GateResult.above(f"{name} at {error.steps}", error.score, limit))
    if evaluation.velocity and gates.velocity_error is not None:
        error_of_all = evaluation.velocity.velocity.overall
        results.append(GateResult.at_most("velocity error", error_of_all, gates.velocity_error))
    if evaluation.velocity and gates.guidance_error is not None:
        error_of_all = evaluation.velocity.guidance.overall
        results.append(GateResult.at_most("guidance error", error_of_all, gates.guidance_error))
    return results


def to_json(evaluation: Evaluation, gate_results: Sequence[GateResult]) -> str:
    """Metrics and gates for programs; a number that is not finite becomes null."""
    velocity = evaluation.velocity
    # What it holds of each size stands in `by_size`, under text: `asdict` makes dictionaries of keys too.
    flat = replace(evaluation, velocity=velocity and replace(velocity, velocity_by_size={}))
    content = {**asdict(flat), "gates": [asdict(result) for result in gate_results]}
    if velocity:
        del content["velocity"]["velocity_by_size"]
    return json.dumps(replace_non_finite(content), indent=1, allow_nan=False) + "\n"


def replace_non_finite(value: Any) -> Any:
    """The same content with null for each number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_report(evaluation: Evaluation, gate_results: Sequence[GateResult], console: Console) -> None:
    """Print a table of each kind of metric that was measured, and of the gates."""
    console.print(f"{evaluation.run} at {evaluation.samples} samples, tail policy {evaluation.tail}")
    gates = [(gate.name, f"{gate.found:.4f}", gate.asked, "PASS" if gate.passed else "FAIL") for gate in gate_results]
    for table in (
        _fidelity_table(evaluation.fidelity),
        paired_table(evaluation.paired, f" at {evaluation.size}" if evaluation.by_size else ""),
        _paired_by_size_table(evaluation.by_size),
        _velocity_table(evaluation.velocity, evaluation.by_size),
        _straightness_table(evaluation.straightness),
        _distances_table(evaluation.distances),
        make_table("gates", ["", "measured", "limit", ""], gates),
    ):
        if table.row_count:
            console.print(table)


def _fidelity_table(fidelity: Mapping[str, Fidelity]) -> Table:
    attributes = next(iter(fidelity.values())).by_attribute if fidelity else ()
    shares = {name: [*metrics.by_attribute.values(), metrics.all_at_once] for name, metrics in fidelity.items()}
    rows = [
        (n, *("-" if math.isnan(share) else f"{100 * share:.1f}" for share in shares[n]), str(fidelity[n].pictures))
        for n in fidelity
    ]
    return make_table("pictures that show what their prompts name, %", ["", *attributes, "all", "pictures"], rows)


def paired_table(paired: Mapping[str, Sequence[PairedError]], where: str = "") -> Table:
    """A row for each field and number of steps; `where` ends the title."""
    rows = []
    for name, errors in paired.items():
        for e in errors:
            score = "-" if e.score is None else f"{e.score:.3f}"
            interval = "-" if e.interval is None else f"{e.interval[0]:.3f} to {e.interval[1]:.3f}"
            rows.append((name, f"{e.steps}", f"{e.student:.4f}", f"{e.floor:.4f}", f"{e.ceiling:.4f}", score, interval))
    return make_table(f"paired-noise error{where}", ["", "steps", "error", "floor", "ceiling", "score", "95 %"], rows)


def _paired_by_size_table(by_size: Mapping[str, SizeErrors]) -> Table:
    """The student's errors, as above, at each size."""
    return paired_table({size: errors.paired for size, errors in by_size.items()}, " of the student by size")


def _velocity_table(velocity: VelocityErrors | None, by_size: Mapping[str, SizeErrors]) -> Table:
    bins = len(velocity.velocity.by_bin) if velocity else 0
    columns = ["", "all", *(f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins))]
    errors = {"velocity": velocity.velocity, "guidance difference": velocity.guidance} if velocity else {}
    rows = [
        (name, *("-" if value is None else f"{value:.4f}" for value in (error.overall, *error.by_bin)))
        for name, error in errors.items()
    ]
    of_sizes = {size: errors.velocity for size, errors in by_size.items() if errors.velocity is not None}
    rows += [(f"velocity at {size}", f"{error:.4f}", *("" for _ in range(bins))) for size, error in of_sizes.items()]
    return make_table("held-out relative squared error", columns, rows)


def _straightness_table(measured: Straightness | None) -> Table:
    rows = [] if measured is None else [(n, f"{measured.steps[n]}", f"{v:.4f}") for n, v in measured.relative.items()]
    return make_table("curvature of the trajectories, 0 for straight lines", ["", "steps", "relative"], rows)


def _distances_table(distances: Distances | None) -> Table:
    heads = ["", "steps", "pictures", "Frechet", "95 % of the floor", "KID", "95 % of the floor", "CLIP"]
    if distances is None:
        return make_table("", heads, [])
    rows = [
        _distances_row(name, column, column.floor or distances.floor)
        for name, columns in distances.columns.items()
        for column in columns
    ]
    return make_table(f"against {distances.reference}, features {distances.features or 'none'}", heads, rows)


def _distances_row(name: str, column: Column, floor: Floor | None) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".4f") -> str:
        return "-" if value is None else f"{value:{form}}"

    limits = (floor.frechet.limit, floor.kid.limit) if floor else (None, None)
    return (
        name,
        number(column.steps, "d"),
        f"{column.pictures}",
        number(column.frechet),
        number(limits[0]),
        number(column.kid),
        number(limits[1]),
        number(column.clip),
    )


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column names its rows."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
