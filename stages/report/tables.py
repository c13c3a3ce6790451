"""Tables of the page: what was made from what, what was measured, few steps, classes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from stages.export.measured_loras import HEADS, lora_rows
from stages.export.tables import attributes_of
from stages.report.charts import short
from stages.report.records import RunRecord

Cells = Sequence[str]
FIDELITY_TEXT = "How many of a hundred pictures show what their prompt names, by a judge of pictures."
PAIRED_TEXT = (
    "Teacher and student start from the same noise and should end at the same picture. Floor: the teacher against "
    "itself with more steps. Ceiling: unrelated pictures. Score: 0 at the floor, 1 at the ceiling; 95 %: its interval."
)
STRAIGHTNESS_TEXT = (
    "How far the ways from noise to picture are from straight lines: 0 for straight ones, which a single step follows "
    "exactly. Relative to the squared distance from noise to picture."
)
VELOCITY_TEXT = "How far its predictions are from the teacher's on held-out data, over all and by time s (1 is noise)."
LORA_TEXT = (
    "LoRAs made for the teacher, loaded into this model. Score: 0 is the teacher's own picture with the LoRA, 1 an "
    "unrelated one; beside it the score of this model without the LoRA. Effect: what it changes of the velocity, over "
    "the same of the teacher."
)
MAX_TABLE_ROWS = 200
SHOWN_SENTENCES, SHOWN_CHARACTERS = 3, 60
"""Of a list of sentences, the first ones, and of each its beginning."""


@dataclass(frozen=True)
class PageTable:
    """A table with its title and how to read it; the first column names the rows."""

    title: str
    heads: Cells
    rows: Sequence[Cells]
    text: str = ""
    is_code: bool = False
    """Whether the cells are hashes and the like."""


def overview_table(runs: Sequence[RunRecord], outcomes: Sequence[str]) -> PageTable:
    """One row for each run."""
    rows = []
    for run, outcome in zip(runs, outcomes, strict=True):
        held_out = next((line.held_out for line in reversed(run.validations) if line.held_out is not None), None)
        end = run.history.landings.get("end")
        rows.append([run.name, outcome, f"{run.seen_samples:,}", short(held_out), short(end)])
    return PageTable("Runs of this page", ["run", "outcome", "samples", "held-out error", "error of few steps"], rows)


def hash_table(run: RunRecord) -> PageTable:
    """What a run was made from, by sha256."""
    origin, history = run.origin, run.history
    facts: dict[str, Any] = {
        **{f"teacher: {part}": digest for part, digest in sorted(origin.teacher_sha256.items())},
        "cache: recipe": origin.recipe_sha256 or None,
        "cache: manifest": history.cache_facts.get("manifest_sha256"),
        "cache: pictures and states": _cache_counts(history.cache_facts),
        "student: weights in the export": run.export.get("student_sha256"),
        "student: made from the run": (origin.base or {}).get("sha256"),
        "adapters": json.dumps(origin.lora, sort_keys=True) if origin.lora else None,
        "picture sizes": ", ".join(origin.sizes) or None,
        "final checkpoint": f"{run.samples:,} samples" if run.complete else None,
    }
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    return PageTable(run.name, ["part", "sha256 or value"], rows, is_code=True)


def _cache_counts(facts: Mapping[str, Any]) -> str | None:
    return f"{facts['records']:,} pictures, {facts['samples']:,} states" if facts else None


def settings_text(run: RunRecord) -> str:
    """The settings that a run was started with, as YAML without paths of its machine."""
    settings = dict(run.history.settings)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100) if settings else ""


def evaluation_tables(run: RunRecord) -> list[PageTable]:
    """Everything that was measured of the run's checkpoint."""
    evaluation, conversion = run.history.evaluation, run.history.conversion
    tables = [
        _gates(run),
        _paired(evaluation.get("paired") or {}, "Same noise, same picture"),
        _fidelity(evaluation.get("fidelity") or {}),
        _velocity(evaluation.get("velocity") or {}),
        _sizes(evaluation.get("by_size") or {}),
        _straightness(evaluation.get("straightness") or {}),
        *_distances(evaluation.get("distances") or {}),
        PageTable("LoRAs of its teacher on this model", HEADS, lora_rows(run.history.loras), LORA_TEXT),
        _paired(conversion.get("errors") or {}, "Conversion: same noise, same picture"),
    ]
    return [table for table in tables if table.rows]


def _gates(run: RunRecord) -> PageTable:
    rows = [[one.name, short(one.found), one.asked, "kept" if one.passed else "missed"] for one in run.gates]
    text = "Limits that were set beforehand. A control is something that must fail, to show that the measure can tell."
    return PageTable("Limits", ["", "measured", "limit", ""], rows, text)


def _paired(paired: Mapping[str, Any], title: str) -> PageTable:
    rows = [
        [model, str(one["steps"]), *(short(one[key]) for key in ("student", "floor", "ceiling", "score")),
         interval(one.get("interval"))]
        for model, errors in paired.items()
        for one in errors
    ]  # fmt: skip
    return PageTable(title, ["", "steps", "error", "floor", "ceiling", "score", "95 %"], rows, PAIRED_TEXT)


def _fidelity(fidelity: Mapping[str, Any]) -> PageTable:
    attributes = attributes_of(fidelity)
    rows = [
        [model, *map(_hundredths, (*map(one["by_attribute"].get, attributes), one["all_at_once"]))]
        for model, one in fidelity.items()
    ]
    return PageTable("Pictures that show what was asked, %", ["", *attributes, "all at once"], rows, FIDELITY_TEXT)


def _hundredths(share: float | None) -> str:
    return short(None) if share is None else f"{100 * share:.1f}"


def _straightness(measured: Mapping[str, Any]) -> PageTable:
    if not measured:
        return PageTable("", [], [])
    rows = [[model, short(measured["steps"].get(model)), short(value)] for model, value in measured["relative"].items()]
    text = f"{STRAIGHTNESS_TEXT} Of {measured['pictures']:,} pictures."
    return PageTable("Straightness", ["", "steps", "curvature"], rows, text)


def _velocity(velocity: Mapping[str, Any]) -> PageTable:
    if not velocity:
        return PageTable("", [], [])
    bins = len(velocity["velocity"]["by_bin"])
    heads = ["", "all", *(f"s {i / bins:.1f}–{(i + 1) / bins:.1f}" for i in range(bins))]
    rows = [
        [label, *map(short, (velocity[key]["overall"], *velocity[key]["by_bin"]))]
        for key, label in (("velocity", "velocity"), ("guidance", "guidance difference"))
    ]
    return PageTable("Error of its predictions", heads, rows, VELOCITY_TEXT)


def _sizes(by_size: Mapping[str, Any]) -> PageTable:
    rows = [
        [size, str(one["steps"]), short(one["score"]), interval(one.get("interval")), short(errors["velocity"])]
        for size, errors in by_size.items()
        for one in errors["paired"]
    ]
    heads = ["size", "steps", "score", "95 %", "velocity error"]
    return PageTable("By picture size", heads, rows, "The same score at each size that was measured.")


def _distances(distances: Any) -> list[PageTable]:
    """Distances between sets of pictures, whatever they are called: one row for each number, by its place."""
    rows = [[place, value if isinstance(value, str) else _text(value)] for place, value in _flat(distances)]
    text = "How far sets of pictures are from each other in the features of a network."
    return [PageTable("Distances between sets of pictures", ["", "value"], rows[:MAX_TABLE_ROWS], text)]


def _flat(value: Any, place: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [
            leaf for key, inner in value.items() for leaf in _flat(inner, f"{place} · {key}" if place else str(key))
        ]
    if isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        return [leaf for number, inner in enumerate(value, 1) for leaf in _flat(inner, f"{place} · {number}")]
    if isinstance(value, list):
        return [(place, _list_text(value))]
    return [] if value is None else [(place, value)]


def _list_text(values: Sequence[Any]) -> str:
    """Numbers one after the other; of sentences how many, and the first few."""
    if not any(isinstance(one, str) for one in values):
        return ", ".join(map(_text, values))
    texts = [_text(one) for one in values[:SHOWN_SENTENCES]]
    shown = [f"“{text[:SHOWN_CHARACTERS]}{'…' * (len(text) > SHOWN_CHARACTERS)}”" for text in texts]
    return f"{len(values):,}: {', '.join([*shown, *(['…'] if len(values) > len(shown) else [])])}"


def _text(value: Any) -> str:
    return short(value) if value is None or isinstance(value, int | float) else str(value)


def few_steps_table(runs: Sequence[RunRecord]) -> PageTable:
    """The landing errors of students of few steps, more steps first."""
    fast = sorted((run for run in runs if run.origin.windows), key=lambda run: -(run.origin.windows or 0))
    most = max([len(run.history.landings.get("landing_by_s", ())) for run in fast], default=0)
    rows = []
    for run in fast:
        errors = run.history.landings
        by_step = [short(value) for value in reversed(errors.get("landing_by_s", ()))]
        low, high = run.origin.guidance_range or (None, None)
        values = [short(errors.get("end")), short(errors.get("landing")), *by_step]
        rows.append([run.name, str(run.origin.windows), f"{short(low)} to {short(high)}", *values,
                     *[""] * (most - len(by_step))])  # fmt: skip
    heads = ["run", "steps", "guidance", "finished picture", "one step", *(f"step {n}" for n in range(1, most + 1))]
    text = (
        "Relative squared errors on held-out data, 0 is exact. Finished picture: all steps from the same noise. One "
        "step: a single landing from the right place, over all steps and for each, the first from pure noise."
    )
    return PageTable("Students of few steps", heads, rows, text)


def class_table(run: RunRecord) -> PageTable:
    """Each class before and after, as the run's own table has it; or the last exam where training goes on."""
    if run.classes:
        heads = list(run.classes[0])
        rows = [[row[head] for head in heads] for row in run.classes]
        names = [head.replace("_", " ") for head in heads]
        return PageTable(f"Classes: {run.name}", names, rows[:MAX_TABLE_ROWS], "Before: the student it started from.")
    if not run.exams:
        return PageTable("", [], [])
    last = run.exams[-1]
    columns = {"right pictures": last.all, "error against the teacher": last.paired_error, "points lost": last.lost}
    columns = {name: values for name, values in columns.items() if values}
    classes = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [[name, *(short(values.get(name)) for values in columns.values())] for name in classes]
    return PageTable(f"Classes: {run.name}, after {last.samples:,} samples", ["class", *columns], rows)


def interval(ends: Sequence[float | None] | None) -> str:
    """An interval as text."""
    return "–" if ends is None else f"{short(ends[0])} to {short(ends[1])}"
