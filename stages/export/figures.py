"""What an evaluation found, as Markdown tables and as the hub's `model-index`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

STUDENT = "student"
TASK, DATASET = "text-to-image", "sollune-cache"


def tables(evaluation: Mapping[str, Any]) -> str:
    """Every table of one evaluation; an empty text when nothing was measured."""
    parts = [_fidelity(evaluation.get("fidelity") or {}), _paired(evaluation.get("paired") or {})]
    parts.append(_velocity(evaluation.get("velocity") or {}))
    return "\n\n".join(part for part in parts if part)


def results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The student's own figures, for the head of the card."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=DATASET,
            dataset_name="validation prompts of the teacher's cache",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in _own(evaluation)
    ]


def _own(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    velocity = evaluation.get("velocity")
    if velocity:
        yield "relative_squared_error", "held-out velocity error", velocity["velocity"]["overall"]
    for error in (evaluation.get("paired") or {}).get(STUDENT, ()):
        if error["score"] is not None:
            yield "paired_noise_score", f"paired-noise score at {error['steps']} steps", error["score"]


def _fidelity(fidelity: Mapping[str, Any]) -> str:
    if not fidelity:
        return ""
    names = list(next(iter(fidelity.values()))["by_attribute"])
    rows = [[who, *_shares(one), str(one["pictures"])] for who, one in fidelity.items()]
    return _table("Pictures that show what was said, %", ["", *names, "all", "pictures"], rows)


def _shares(one: Mapping[str, Any]) -> list[str]:
    return [f"{100 * share:.1f}" for share in (*one["by_attribute"].values(), one["all_at_once"])]


def _paired(paired: Mapping[str, Any]) -> str:
    """The student's endpoint error from the same noise: score 0 is as good as the teacher, 1 unrelated."""
    keys = ("student", "floor", "ceiling", "score")
    rows = [
        [who, str(e["steps"]), *("-" if e[key] is None else f"{e[key]:.4f}" for key in keys)]
        for who, errors in paired.items()
        for e in errors
    ]
    heads = ["", "steps", "error", "teacher's own", "unrelated", "score"]
    return _table("Paired-noise error: the same noise must give the teacher's picture", heads, rows) if rows else ""


def _velocity(velocity: Mapping[str, Any]) -> str:
    if not velocity:
        return ""
    bins = len(velocity["velocity"]["by_bin"])
    heads = ["", "all", *(f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins))]
    rows = [
        [name, *("-" if cell is None else f"{cell:.4f}" for cell in (one["overall"], *one["by_bin"]))]
        for name, one in (("velocity", velocity["velocity"]), ("guidance difference", velocity["guidance"]))
    ]
    return _table(f"Relative squared error at {velocity['states']} held-out states", heads, rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
