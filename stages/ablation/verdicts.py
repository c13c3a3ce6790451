"""Verdicts by a stated rule: paired differences over the seeds with 95 % intervals by Student's t.

helps or hurts: the interval of the paired difference excludes 0; no difference found: it does not. Beside each stands
the smallest effect that four of five such experiments would have found.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stages.ablation.metrics import CURVES, lower_is_better
from stages.ablation.study import Comparison, Outcome, Study
from stages.ablation.table import Row

CONFIDENCE, POWER = 0.95, 0.80


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t, by bisection of its distribution function; `probability` in (0, 1)."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"probability {probability}, {degrees} degrees of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
    return high


def t_distribution(t: float, degrees: int) -> float:
    """P(T <= t) for whole degrees of freedom, by the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(theta) ** 2
    term, total = 1.0, 0.0
    for i in range(degrees // 2):
        total += term
        term *= (2 * i + 1 + degrees % 2) / (2 * i + 2 + degrees % 2) * cosine_squared
    if degrees % 2:
        central = 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    else:
        central = math.sin(theta) * total
    return (1 + central) / 2


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, its 95 % interval, and what could have been found."""

    mean: float
    low: float
    high: float
    smallest_detectable: float
    """the size of a true difference that such an experiment finds with a probability of 80 %"""
    pairs: int

    @classmethod
    def paired(cls, arm: Sequence[float], control: Sequence[float]) -> "Difference":
        """Of two lists of at least two values each, in the order of the seeds."""
        differences = [one - other for one, other in zip(arm, control, strict=True)]
        n, mean = len(differences), statistics.fmean(differences)
        error = statistics.stdev(differences, mean) / math.sqrt(n)
        half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
        smallest = (t_quantile((1 + CONFIDENCE) / 2, n - 1) + t_quantile(POWER, n - 1)) * error
        return cls(mean, mean - half, mean + half, smallest, n)

    def outcome(self, lower_is_better: bool) -> Outcome:
        """Whether it is a gain, a loss, or neither by the rule."""
        if self.low <= 0 <= self.high:
            return "no difference found"
        return "helps" if (self.mean < 0) == lower_is_better else "hurts"


@dataclass(frozen=True)
class Verdict:
    """One arm against one control in one figure and regime."""

    study: str
    regime: str
    arm: str
    control: str
    metric: str
    samples: int | None
    """after how many samples; None: at the end"""
    arm_mean: float
    control_mean: float
    difference: float
    low: float
    high: float
    smallest_detectable: float
    seeds: int
    verdict: Outcome
    expected: Outcome | None = None

    @property
    def passed(self) -> bool | None:
        """Whether a control of the design came out as expected; None for an open question."""
        return None if self.expected is None else self.verdict == self.expected

    @property
    def relative(self) -> tuple[float, float, float, float]:
        """Difference, low, high and smallest detectable effect as shares of the control's mean; nan where that is 0."""
        base = abs(self.control_mean) or math.nan
        return self.difference / base, self.low / base, self.high / base, self.smallest_detectable / base


Values = Mapping[tuple[str, str, str, str], Mapping[int, Mapping[int, float]]]
"""(study, regime, arm, metric) -> seed -> samples -> value."""


def values_of(rows: Iterable[Row]) -> Values:
    """The table by run."""
    values: dict[tuple[str, str, str, str], dict[int, dict[int, float]]] = {}
    for row in rows:
        key = row.study, row.regime, row.arm, row.metric
        values.setdefault(key, {}).setdefault(row.seed, {})[row.samples] = row.value
    return values


def compute_verdicts(rows: Iterable[Row], studies: Mapping[str, Study]) -> list[Verdict]:
    """All verdicts of the studies' comparisons for which two seeds of both arms are there, in the studies' order."""
    values = values_of(rows)
    verdicts = []
    for study in studies.values():
        for comparison in study.comparisons:
            for regime in comparison.regimes or study.regimes:
                verdicts += _verdicts_of(study, comparison, regime, values)
    return verdicts


def _verdicts_of(study: Study, comparison: Comparison, regime: str, values: Values) -> list[Verdict]:
    metrics = comparison.metrics or study.metrics
    if comparison.samples is not None:
        metrics = tuple(metric for metric in metrics if metric in CURVES)
    verdicts = []
    for arm in comparison.arms:
        for control in comparison.against:
            for metric in metrics:
                of_arm, of_control = (
                    at_samples(values.get((study.name, regime, name, metric), {}), comparison.samples)
                    for name in (arm, control)
                )
                seeds = sorted(of_arm.keys() & of_control.keys())
                if arm == control or len(seeds) < 2:
                    continue
                ones, others = ([of[seed] for seed in seeds] for of in (of_arm, of_control))
                difference = Difference.paired(ones, others)
                verdicts.append(
                    Verdict(
                        study=study.name,
                        regime=regime,
                        arm=arm,
                        control=control,
                        metric=metric,
                        samples=comparison.samples,
                        arm_mean=statistics.fmean(ones),
                        control_mean=statistics.fmean(others),
                        difference=difference.mean,
                        low=difference.low,
                        high=difference.high,
                        smallest_detectable=difference.smallest_detectable,
                        seeds=len(seeds),
                        verdict=difference.outcome(lower_is_better(metric)),
                        expected=comparison.expected,
                    )
                )
    return verdicts


def at_samples(runs: Mapping[int, Mapping[int, float]], samples: int | None) -> dict[int, float]:
    """seed -> its finite value after so many samples, or its last one; seeds without it are left out."""
    chosen = {seed: curve.get(max(curve) if samples is None else samples) for seed, curve in runs.items()}
    return {seed: value for seed, value in chosen.items() if value is not None and math.isfinite(value)}
