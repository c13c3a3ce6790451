"""Verdicts in words and cells, the same wherever they are shown: the page, the README, the report."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stages.ablation.study import Study
from stages.ablation.verdicts import MIN_PAIRS, Verdict

NONE = "-"
RULE = (
    "Runs of the same seed are compared: the same order of the data and the same random numbers, unless an arm says "
    "that it has another order. An arm helps, or hurts, where the 95 % interval of the mean difference (Student's t "
    "over the seeds) excludes 0; else no difference was found, which does not say that there is none: beside it stands "
    "the smallest effect that four of five such experiments would have found, if the spread between seeds is as it was "
    "measured, which is known within a factor of six by three seeds, of two by eight. With fewer than "
    f"{MIN_PAIRS} seeds, and where the seeds do not differ, no interval can be given, and there is no verdict. "
    "Differences are shares of the control's mean. Each verdict stands for itself: of twenty about nothing, one will "
    "be wrong. While seeds are missing it is a verdict so far."
)
OUTCOMES = {
    "helps": "helps",
    "hurts": "hurts",
    "no difference found": "no difference was found",
    "no verdict": "no verdict",
}
HELD = {True: "held", False: "**did not hold**", None: "cannot be said"}


@dataclass(frozen=True)
class VerdictCells:
    """The numbers of a verdict as text."""

    difference: str
    interval: str
    smallest: str
    seeds: str
    verdict: str


def cells_of(one: Verdict) -> VerdictCells:
    """As shares of the control's mean; as they are where that is 0, and dashes for what cannot be given."""
    own = one.relative

    def signed(value: float) -> str:
        return f"{value:+.1%}" if one.is_relative else f"{value:+.4f}"

    interval = smallest = NONE
    if own.interval is not None:
        interval = f"{signed(own.interval.low)} to {signed(own.interval.high)}"
        smallest = signed(own.interval.smallest_detectable).removeprefix("+")
    return VerdictCells(
        difference=signed(own.mean) if math.isfinite(own.mean) else NONE,
        interval=interval,
        smallest=smallest,
        seeds=seeds_text(one),
        verdict=f"{one.verdict}: {one.reason}" if one.reason else one.verdict,
    )


def seeds_text(one: Verdict) -> str:
    """How many seeds are compared, and of how many others why not."""
    left_out = _left_out(one)
    return f"{one.seeds} ({', '.join(left_out)})" if left_out else str(one.seeds)


def seeds_in_words(one: Verdict) -> str:
    """The same within a sentence."""
    return ", ".join([f"{one.seeds} seed{'s' * (one.seeds != 1)}", *_left_out(one)])


def _left_out(one: Verdict) -> list[str]:
    counts = {"missing": one.missing, "not finite": one.broken}
    return [f"{count} {why}" for why, count in counts.items() if count]


def metric_text(one: Verdict) -> str:
    """The figure, and when it was taken unless at the end."""
    return one.metric if one.samples is None else f"{one.metric} after {one.samples:,} samples"


def verdict_sentence(one: Verdict, study: Study) -> str:
    """A verdict in plain words, with its interval and the smallest effect that could have been seen."""
    arm, control = (f"{study.arms[name].title} ({name})" for name in (one.arm, one.control))
    cells = cells_of(one)
    start = f"{arm} against {control}: {OUTCOMES[one.verdict]} in {metric_text(one)}"
    if one.reason:
        difference = "" if cells.difference == NONE else f"; the difference is {cells.difference}"
        return f"{start}: {one.reason} ({seeds_in_words(one)}){difference}"
    return (
        f"{start}: {cells.difference}, 95 % interval {cells.interval}, {seeds_in_words(one)}; an effect of "
        f"{cells.smallest} would have been found in four of five such experiments"
    )


def mean_and_deviation(values: Sequence[float], runs: int | None = None) -> str:
    """The mean of finite values with the standard deviation between them; of `runs`, where some have none."""
    if not values:
        return NONE
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    some = "" if runs is None or len(values) == runs else f" ({len(values)} of {runs})"
    return f"{statistics.fmean(values):.4f}{deviation}{some}"
