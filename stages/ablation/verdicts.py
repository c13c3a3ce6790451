"""Verdicts by a stated rule: paired differences over the seeds with 95 % intervals by Student's t.

helps or hurts: the interval of the paired difference excludes 0; no difference found: it does not. Beside each stands
the smallest effect that four of five such experiments would have found. No verdict: no interval can be given.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stages.ablation.metrics import CURVES, lower_is_better
from stages.ablation.study import Comparison, Finding, Outcome, Study
from stages.ablation.table import Row

CONFIDENCE, POWER = 0.95, 0.80
MIN_PAIRS = 3
"""Seeds of which an interval is given: of two it is wider than any effect, and two may agree by chance."""
ROUNDING = 1e-9
"""Differences that are within this share of the values are the same but for rounding."""


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
class Interval:
    """The 95 % interval of a mean difference, and what could have been found."""

    low: float
    high: float
    smallest_detectable: float
    """the size of a true difference that such an experiment finds with a probability of 80 %"""

    def over(self, base: float) -> "Interval":
        """The same as shares of a base."""
        return Interval(self.low / base, self.high / base, self.smallest_detectable / base)


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, nan of none, and its interval where one can be given."""

    mean: float
    interval: Interval | None
    pairs: int

    @classmethod
    def paired(cls, arm: Sequence[float], control: Sequence[float]) -> "Difference":
        """Of two lists of finite values, in the order of the seeds.

        No interval is given of fewer than three pairs, nor where the differences do not differ between the seeds:
        Student's t takes its width from that spread, and without one it would claim certainty.
        """
        differences = [one - other for one, other in zip(arm, control, strict=True)]
        n = len(differences)
        mean = statistics.fmean(differences) if differences else math.nan
        if n < MIN_PAIRS or do_not_differ(differences, max(map(abs, (*arm, *control)))):
            return cls(mean, None, n)
        error = statistics.stdev(differences, mean) / math.sqrt(n)
        half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
        smallest = (t_quantile((1 + CONFIDENCE) / 2, n - 1) + t_quantile(POWER, n - 1)) * error
        return cls(mean, Interval(mean - half, mean + half, smallest), n)

    def outcome(self, lower_is_better: bool) -> Outcome:
        """Whether it is a gain, a loss, or neither by the rule; no verdict without an interval."""
        if self.interval is None:
            return "no verdict"
        if self.interval.low <= 0 <= self.interval.high:
            return "no difference found"
        return "helps" if (self.mean < 0) == lower_is_better else "hurts"


def do_not_differ(values: Sequence[float], scale: float) -> bool:
    """Whether two or more values are the same but for rounding in numbers of this size."""
    return len(values) > 1 and max(values) - min(values) <= ROUNDING * scale


@dataclass(frozen=True)
class Verdict:
    """One arm against one control in one figure and regime, over the seeds of which both have a finite value."""

    study: str
    regime: str
    arm: str
    control: str
    metric: str
    samples: int | None
    """after how many samples; None: at the end"""
    arm_values: Sequence[float]
    """by seed, as those of the control"""
    control_values: Sequence[float]
    difference: Difference
    verdict: Outcome
    expected: Finding | None = None
    missing: int = 0
    """seeds that the study has of both, without a value of either"""
    broken: int = 0
    """seeds at which the value of either is not finite"""

    @property
    def seeds(self) -> int:
        """How many are compared."""
        return self.difference.pairs

    @property
    def control_mean(self) -> float:
        """Of the seeds that are compared; nan of none."""
        return statistics.fmean(self.control_values) if self.control_values else math.nan

    @property
    def passed(self) -> bool | None:
        """Whether a control of the design came out as expected; None for an open question, and without a verdict."""
        if self.expected is None or self.verdict == "no verdict":
            return None
        return self.verdict == self.expected

    @property
    def is_relative(self) -> bool:
        """Whether there are shares of the control's mean: it is not 0."""
        return bool(self.control_mean)

    @property
    def base(self) -> float:
        """What differences are shares of: the control's mean, or 1, for absolute ones, where that is 0."""
        return abs(self.control_mean) if self.is_relative else 1.0

    @property
    def relative(self) -> Difference:
        """The difference as a share of the control's mean; as it is where that is 0."""
        own = self.difference.interval
        return Difference(self.difference.mean / self.base, own and own.over(self.base), self.seeds)

    @property
    def reason(self) -> str:
        """Why there is no verdict; empty where there is one."""
        if self.verdict != "no verdict":
            return ""
        if not self.seeds:
            return "no seed has a finite value of both"
        values = {*self.arm_values, *self.control_values}
        if self.seeds > 1 and len(values) == 1:
            if values == {1.0} and not lower_is_better(self.metric):
                return "all pictures are right in every run: this figure cannot tell them apart"
            return "every run has the same value: this figure cannot tell them apart"
        differences = [one - other for one, other in zip(self.arm_values, self.control_values, strict=True)]
        if do_not_differ(differences, max(map(abs, values))):
            return "the seeds do not differ: no interval can be given"
        return f"too few seeds for an interval, which needs {MIN_PAIRS}"


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
    """All verdicts of the studies' comparisons of which a seed of both arms is there, in the studies' order."""
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
    pairs = [(arm, control) for arm in comparison.arms for control in comparison.against if arm != control]
    found = [
        _verdict_of(study, comparison, regime, arm, control, metric, values)
        for arm, control in pairs
        for metric in metrics
    ]
    return [verdict for verdict in found if verdict is not None]


def _verdict_of(
    study: Study, comparison: Comparison, regime: str, arm: str, control: str, metric: str, values: Values
) -> Verdict | None:
    """One verdict; None where no seed has any value of both."""
    of_arm, of_control = (
        values_at(values.get((study.name, regime, name, metric), {}), comparison.samples) for name in (arm, control)
    )
    common = sorted(of_arm.keys() & of_control.keys())
    if not common:
        return None
    planned = range(min(study.seeds_of(arm), study.seeds_of(control)))
    seeds = [seed for seed in common if math.isfinite(of_arm[seed]) and math.isfinite(of_control[seed])]
    ones, others = ([of[seed] for seed in seeds] for of in (of_arm, of_control))
    difference = Difference.paired(ones, others)
    return Verdict(
        study=study.name,
        regime=regime,
        arm=arm,
        control=control,
        metric=metric,
        samples=comparison.samples,
        arm_values=ones,
        control_values=others,
        difference=difference,
        verdict=difference.outcome(lower_is_better(metric)),
        expected=comparison.expected,
        missing=len({*planned} - {*common}),
        broken=len(common) - len(seeds),
    )


def values_at(runs: Mapping[int, Mapping[int, float]], samples: int | None) -> dict[int, float]:
    """seed -> its value after so many samples, or its last one, finite or not; seeds without it are left out."""
    chosen = {seed: curve.get(max(curve) if samples is None else samples) for seed, curve in runs.items()}
    return {seed: value for seed, value in chosen.items() if value is not None}


def finite_at(runs: Mapping[int, Mapping[int, float]], samples: int | None) -> dict[int, float]:
    """The same, of finite values alone."""
    return {seed: value for seed, value in values_at(runs, samples).items() if math.isfinite(value)}
