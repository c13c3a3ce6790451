"""The figures of a study: their names, and which of them are better when they are lower."""

import re

CURVES = ("validation velocity error", "validation guidance error", "cache gap")
"""Figures of the averaged student at every checkpoint, from the journal."""
JOURNAL_KEYS = dict(zip(CURVES, ("held_out", "held_out_guidance", "cache_gap"), strict=True))
"""Figure of a curve -> key of the journal's validation line."""
PATTERN = re.compile(
    r"(velocity|guidance) error(, s 0\.\d to \d\.\d)?|(paired error|pictures right) at [1-9]\d* steps"
    r"(, guidance \d+(\.\d+)?)?"
)


def is_metric(name: str) -> bool:
    """Whether a figure of this name may be measured."""
    return name in CURVES or PATTERN.fullmatch(name) is not None


def lower_is_better(name: str) -> bool:
    """Whether less of this figure is better: of all errors, not of the share of right pictures."""
    return not name.startswith("pictures right")


def picture_metric(kind: str, steps: int, guidance: float | None) -> str:
    """The name of a figure of pictures; `guidance` where there are several scales."""
    return f"{kind} at {steps} steps" + ("" if guidance is None else f", guidance {guidance:g}")


def bin_metric(number: int, bins: int) -> str:
    """The name of the velocity error in one of so many equal bins of s."""
    return f"velocity error, s {number / bins:.1f} to {(number + 1) / bins:.1f}"
