"""Learning curves: after how many samples an arm reaches the error that the first arm ends with."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from stages.ablation.verdicts import Values


@dataclass(frozen=True)
class Reached:
    """Samples to a target error, of those seeds that reach it."""

    mean_samples: float | None
    seeds_reached: int
    seeds: int


def samples_to_reach(curve: Mapping[int, float], target: float) -> float | None:
    """Where a curve first falls to the target, linear between its points; None where it never does.

    A curve that is below at its first point gives that point: nothing was measured before.
    """
    points = sorted(curve.items())
    for (before, high), (after, low) in zip([points[0], *points], points, strict=False):
        if low <= target:
            share = 1.0 if high <= target else (high - target) / (high - low)
            return before + share * (after - before)
    return None


def samples_to_final_error(
    values: Values, study: str, regime: str, arm: str, reference: str, metric: str
) -> Reached | None:
    """Of an arm, to the reference arm's last value of a curve, seed by seed; None without a common seed."""
    own = values.get((study, regime, arm, metric), {})
    others = values.get((study, regime, reference, metric), {})
    seeds = sorted(own.keys() & others.keys())
    if not seeds:
        return None
    samples = [samples_to_reach(own[seed], others[seed][max(others[seed])]) for seed in seeds]
    reached = [number for number in samples if number is not None]
    return Reached(statistics.fmean(reached) if reached else None, len(reached), len(seeds))
