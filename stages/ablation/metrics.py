"""The figures of a study: their names, and which of them are better when they are lower."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

CommandName: TypeAlias = Literal["distill", "finetune_classes"]
CURVES = ("validation velocity error", "validation guidance error", "cache gap")
"""Figures of the averaged student at every checkpoint, from the journal."""
JOURNAL_KEYS = dict(zip(CURVES, ("held_out", "held_out_guidance", "cache_gap"), strict=True))
"""Figure of a curve -> key of the journal's validation line."""
SHARE = "pictures right"
"""How the names of shares begin: more of them is better."""
EXAM_KINDS = {SHARE: "all", "paired error": "paired_error"}
"""Kind of an exam's figure -> its quantity in the table of classes."""
PATTERNS: Mapping[CommandName, re.Pattern[str]] = {
    "distill": re.compile(
        r"(velocity|guidance) error(, s 0\.\d to \d\.\d)?|(paired error|pictures right) at [1-9]\d* steps"
        r"(, guidance \d+(\.\d+)?)?"
    ),
    "finetune_classes": re.compile(
        rf"({'|'.join(EXAM_KINDS)}), ((top|mid|low|all) classes|outside)(, before)?",
    ),
}
EXAMPLES: Mapping[CommandName, str] = {
    "distill": "velocity error, guidance error, paired error at 8 steps, pictures right at 8 steps, or "
    + ", ".join(CURVES),
    "finetune_classes": "pictures right, top classes (mid, low, all), pictures right, outside, "
    "or paired error, all classes",
}


def is_metric(name: str, command: CommandName = "distill") -> bool:
    """Whether a figure of this name may be measured of the command's runs."""
    return (command == "distill" and name in CURVES) or PATTERNS[command].fullmatch(name) is not None


def measurable(steps: Iterable[int], guidance: Sequence[float], with_scorer: bool, bins: int) -> set[str]:
    """The figures of a distilled student: of pictures in so many steps, under each guidance scale; `bins` of s."""
    kinds = ["paired error", *([SHARE] if with_scorer else [])]
    scales: Sequence[float | None] = guidance if len(guidance) > 1 else [None]
    pictures = {picture_metric(kind, n, scale) for kind in kinds for n in steps for scale in scales}
    velocity = {"velocity error", "guidance error", *(bin_metric(i, bins) for i in range(bins))} if bins else set()
    return {*CURVES, *pictures, *velocity}


def lower_is_better(name: str) -> bool:
    """Whether less of this figure is better: of all errors, not of the share of right pictures."""
    return not name.startswith(SHARE)


def picture_metric(kind: str, steps: int, guidance: float | None) -> str:
    """The name of a figure of pictures; `guidance` where there are several scales."""
    return f"{kind} at {steps} steps" + ("" if guidance is None else f", guidance {guidance:g}")


def exam_metric(kind: str, group: str, when: str) -> str:
    """The name of a figure of the exam of classes: of one group of them, before or after the training."""
    return f"{kind}, {group}" + (", before" if when == "before" else "")


def bin_metric(number: int, bins: int) -> str:
    """The name of the velocity error in one of so many equal bins of s."""
    return f"velocity error, s {number / bins:.1f} to {(number + 1) / bins:.1f}"
