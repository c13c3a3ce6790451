"""Learning curves: their means with intervals, and after how many samples an arm reaches the first arm's last error."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.ablation.verdicts import CONFIDENCE, MIN_PAIRS, Values, do_not_differ, finite_at, t_quantile


@dataclass(frozen=True)
class CurvePoint:
    """The runs of an arm after so many samples."""

    samples: int
    mean: float
    half_width: float | None
    """half of the 95 % interval of the mean; None where none can be given"""
    seeds: int


def mean_curve(runs: Mapping[int, Mapping[int, float]]) -> list[CurvePoint]:
    """The mean over the seeds at every number of samples that all of them have a finite value at."""
    if not runs:
        return []
    points = []
    for samples in sorted(set.intersection(*(set(curve) for curve in runs.values()))):
        values = list(finite_at(runs, samples).values())
        if len(values) == len(runs):
            points.append(CurvePoint(samples, statistics.fmean(values), half_width(values), len(values)))
    return points


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean by Student's t; None of fewer than three values, and of equal ones."""
    if len(values) < MIN_PAIRS or do_not_differ(values, max(map(abs, values))):
        return None
    return t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Reached:
    """Samples to a target error, of those seeds that reach it."""

    mean_samples: float | None
    seeds_reached: int
    seeds: int


def samples_to_reach(curve: Mapping[int, float], target: float) -> float | None:
    """Where a curve first falls to the target, linear between its points; None where it never does.

    A curve that is below at its first point gives that point: nothing was measured before. Values that are not finite
    are no points.
    """
    points = sorted((samples, value) for samples, value in curve.items() if math.isfinite(value))
    for (before, high), (after, low) in zip([*points[:1], *points], points, strict=False):
        if low <= target:
            share = 1.0 if high <= target else (high - target) / (high - low)
            return before + share * (after - before)
    return None


def samples_to_final_error(
    values: Values, study: str, regime: str, arm: str, reference: str, metric: str
) -> Reached | None:
    """Of an arm, to the reference arm's last value of a curve, seed by seed; None without a common seed."""
    own = values.get((study, regime, arm, metric), {})
    targets = finite_at(values.get((study, regime, reference, metric), {}), None)
    seeds = sorted(own.keys() & targets.keys())
    if not seeds:
        return None
    samples = [samples_to_reach(own[seed], targets[seed]) for seed in seeds]
    reached = [number for number in samples if number is not None]
    return Reached(statistics.fmean(reached) if reached else None, len(reached), len(seeds))


def reached_text(reached: Reached | None) -> str:
    """The mean number of samples, and of how many seeds where some never get there."""
    if reached is None:
        return "-"
    if reached.mean_samples is None:
        return "never"
    some = "" if reached.seeds_reached == reached.seeds else f" ({reached.seeds_reached} of {reached.seeds})"
    return f"{reached.mean_samples:,.0f}{some}"
