"""Which classes need it most, and the priority that follows.

The need of a class is the geometric mean of its paired errors: the logarithms spread alike in all classes (a deviation
of about 1.1 in the embedded world), whereas a plain mean hangs on a few pictures. It is pooled (`pooling`) on what the
cache foretells. Its part of all error is r_c = C f_c need_c / sum f need, f_c the class's share of the cache's records.
  top: r_c is above 1 by more than its standard error, or the scorer says that more is lost than two standard errors
  low: r_c is below 1 by more than its standard error
  mid: the rest, among them every class that the measurement cannot tell from an even part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.classes import Priority
from stages.evaluate.cached import Cached
from stages.evaluate.pooling import Means, means, pooled
from stages.evaluate.probe import Probe

CERTAIN_LOSS = 2.0
"""Standard errors by which pictures must be lost to make a class top, whatever its paired error."""


@dataclass(frozen=True)
class Figure:
    """A number and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Need:
    """What was found of one class."""

    pattern: str
    priority: Priority
    part: float
    """r: its part of all error over an even part"""
    log_error: float
    """standard error of ln r"""
    paired: Figure
    """geometric mean of the paired errors, as measured"""
    pooled: Figure
    velocity: Figure
    difficulty: Figure | None
    lost: Figure | None
    """share of the pictures that show all that was said: teacher less student"""
    records: int

    @property
    def span(self) -> str:
        """r and the interval of one standard error, which is wider upwards."""
        low, high = (self.part * math.exp(sign * self.log_error) for sign in (-1, 1))
        return f"{self.part:.2f} ({low:.2f}-{high:.2f})"


def needs(patterns: Sequence[str], records: Sequence[int], probed: Probe, cached: Cached) -> list[Need]:
    """The classes, the neediest first."""
    paired = means([own.log() for own in probed.errors])
    velocity = means([own.log() for own in cached.velocity])
    difficulty = means(cached.difficulty) if cached.difficulty else None
    believed = pooled(paired, [velocity.mean, *([difficulty.mean] if difficulty else [])])
    lost = [_own(values) for values in probed.lost] if probed.lost is not None else [None] * len(patterns)

    parts, errors = even_parts(believed, torch.tensor(records, dtype=torch.float64))
    found = [
        Need(
            pattern,
            priority(float(parts[i]), float(errors[i]), lost[i]),
            float(parts[i]),
            float(errors[i]),
            _geometric(paired, i),
            _geometric(believed, i),
            _geometric(velocity, i),
            Figure(float(difficulty.mean[i]), float(difficulty.error[i])) if difficulty else None,
            lost[i],
            records[i],
        )
        for i, pattern in enumerate(patterns)
    ]
    return sorted(found, key=lambda need: (RANK.index(need.priority), -need.part, need.pattern))


RANK: Sequence[Priority] = ("top", "mid", "low")


def even_parts(need: Means, records: Float[Tensor, " C"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """r of each class, whose mean is 1, and the standard error of ln r; need in logarithms.

    The records are a sample of what is asked for, so that the variance of ln f_c is 1 / records.
    """
    weighed = need.mean.exp() * records
    return weighed / weighed.mean(), (need.error.square() + 1 / records).sqrt()


def priority(part: float, log_error: float, lost: Figure | None) -> Priority:
    """The rule."""
    if math.log(part) > log_error or (lost is not None and lost.value > CERTAIN_LOSS * lost.error):
        return "top"
    return "low" if math.log(part) < -log_error else "mid"


def _own(values: Float[Tensor, " n"]) -> Figure:
    return Figure(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def _geometric(logarithms: Means, i: int) -> Figure:
    """exp of a mean of logarithms, with its error to first order."""
    value = float(logarithms.mean[i].exp())
    return Figure(value, value * float(logarithms.error[i]))
