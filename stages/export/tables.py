"""Tables in Markdown for the model card."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def format_interval(interval: Sequence[float | None] | None, form: str = ".3f") -> str:
    """The ends, or a dash where either is missing."""
    low, high = interval or (None, None)
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def markdown_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table; an empty text without rows."""
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) if rows else ""


def metric_tables(evaluation: Mapping[str, Any]) -> str:
    """Every table of one evaluation; an empty text when nothing was measured."""
    tables = {
        "fidelity": _fidelity_table,
        "paired": _paired_table,
        "velocity": _velocity_table,
        "by_size": _size_table,
    }
    texts = [table(evaluation[name]) for name, table in tables.items() if evaluation.get(name)]
    return "\n\n".join(filter(None, texts))


def _fidelity_table(fidelity: Mapping[str, Any]) -> str:
    """Shares of pictures; a dash for an attribute that no sentence names."""
    attributes = attributes_of(fidelity)
    rows = []
    for model, metrics in fidelity.items():
        shares = (*map(metrics["by_attribute"].get, attributes), metrics["all_at_once"])
        rows.append([model, *("-" if share is None else f"{100 * share:.1f}" for share in shares),
                     str(metrics["pictures"])])  # fmt: skip
    return markdown_table("Pictures that show what the prompt states, %", ["", *attributes, "all", "pictures"], rows)


def attributes_of(fidelity: Mapping[str, Any]) -> list[str]:
    """Every attribute of any model."""
    return list(dict.fromkeys(name for metrics in fidelity.values() for name in metrics["by_attribute"]))


def _paired_table(paired: Mapping[str, Any]) -> str:
    """The student's endpoint error from the same noise: score 0 is as good as the teacher, 1 unrelated."""
    rows = [
        [model, str(error["steps"]), *(format_cell(error[key]) for key in ("student", "floor", "ceiling", "score"))]
        for model, errors in paired.items()
        for error in errors
    ]
    heads = ["", "steps", "error", "teacher's own", "unrelated", "score"]
    return markdown_table("Paired-noise error: the same noise must give the teacher's picture", heads, rows)


def conversion_table(conversion: Mapping[str, Any]) -> str:
    """Paired errors of the polished student, of its possible starts and of the base's student; "" for no conversion.

    Beside each the ratio of the polished student's error to it, with its 95 % interval.
    """
    rows = []
    for model, errors in (conversion.get("errors") or {}).items():
        ratios = {one["steps"]: one for one in (conversion.get("comparisons") or {}).get(model, ())}
        for error in errors:
            ratio = ratios.get(error["steps"], {})
            rows.append(
                [
                    model,
                    str(error["steps"]),
                    *(format_cell(error[key]) for key in ("student", "floor", "ceiling", "score")),
                    format_interval(error["interval"]),
                    format_cell(ratio.get("ratio")),
                    format_interval(ratio.get("ratio_interval")),
                ]
            )
    heads = ["", "steps", "error", "teacher's own", "unrelated", "score", "95 %", "polished / this", "95 %"]
    title = (
        f"Conversion: paired-noise error on {conversion.get('prompts')} prompts at {conversion.get('size')}; base is "
        "the student of the base model, unchanged; delta that student plus what the fine-tune changed; graft the "
        "fine-tune with its time embedding re-solved; polished is this model"
    )
    return markdown_table(title, heads, rows)


def _velocity_table(velocity: Mapping[str, Any]) -> str:
    bins = len(velocity["velocity"]["by_bin"])
    heads = ["", "all", *(f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins))]
    rows = [
        [name, *map(format_cell, (error["overall"], *error["by_bin"]))]
        for name, error in (("velocity", velocity["velocity"]), ("guidance difference", velocity["guidance"]))
    ]
    return markdown_table(f"Relative squared error at {velocity['states']} held-out states", heads, rows)


def _size_table(by_size: Mapping[str, Any]) -> str:
    """The student's paired scores and velocity error at each picture size; none where one alone was measured."""
    steps = sorted({error["steps"] for errors in by_size.values() for error in errors["paired"]})
    rows = []
    for size, errors in by_size.items():
        scores = {error["steps"]: error["score"] for error in errors["paired"]}
        rows.append([size, *(format_cell(scores.get(n)) for n in steps), format_cell(errors["velocity"])])
    heads = ["size", *(f"score at {n} steps" for n in steps), "velocity error"]
    return markdown_table("The student at each picture size (width x height)", heads, rows)
