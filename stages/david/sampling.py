"""How often each bin of time is asked for, where David finds the student wrong.

pi is the measure that the loss means, q only how it is sampled: a draw in bin k weighs omega = pi_k / q_k, which is not
normalised inside a batch, so that the mean of the loss does not move (mathematics.md section 4).
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from configs.strict import Strict
from stages.david.profile import PerBin
from stages.flow.timesteps import shift

LEAST_EFFECTIVE = 0.5
"""David's share of q sinks until a sample is worth at least half of one under pi."""


class SamplingConfig(Strict):
    """How the times of training are chosen; knobs of the original keep their names."""

    scheme: Literal["stored", "david", "original"] = Field(
        "stored",
        description="stored: every draw once an epoch; david: more of the bins that he finds wrong, weighed by pi / q "
        "so that the loss stays the same; original: the same without weights, bins that he cannot tell switched off, "
        "shift afterwards (biased, for the ablation)",
    )
    david_share: float = Field(
        0.7, ge=0, lt=1, description="David's share of q, the rest is pi: pi / q <= 1 / (1 - it)"
    )
    profile_samples: int = Field(
        2500, ge=1, description="samples of his profile of the bins: its memory, and how long a q stays"
    )
    reliability_threshold: float = Field(
        0.15,
        ge=0,
        le=1,
        description="a bin in which he finds less than this share of the teacher's features is neutral",
    )
    timestep_shift: float = Field(
        1.0, gt=0, description="shift S of pi from the times as stored; above 1 leans to noise (the original had 3)"
    )
    base_jitter: float = Field(
        5.0, gt=0, description="half-width of the jitter around a bin's centre, in teacher's steps; void in a cache"
    )
    adaptive_chaos: bool = Field(True, description="jitter widens with the entropy of the patterns; void in a cache")

    @model_validator(mode="after")
    def _shift_is_drawn(self) -> "SamplingConfig":
        if self.scheme == "stored" and self.timestep_shift != 1:
            raise ValueError(f"timestep_shift = {self.timestep_shift} needs scheme david (david_share 0: shift alone)")
        return self


def shifted(share: PerBin, factor: float) -> PerBin:
    """Shares of equal bins of a time after its shift, for times that are uniform inside their bin."""
    edges = torch.linspace(0, 1, len(share) + 1, dtype=torch.float64)
    came_from = shift(edges, 1 / factor)
    low = torch.maximum(came_from[:-1, None], edges[:-1])
    high = torch.minimum(came_from[1:, None], edges[1:])
    return (high - low).clamp_min(0) * len(share) @ share


def wanted(pi: PerBin, difficulty: PerBin) -> PerBin:
    """q_david: proportional to difficulty times pi; pi itself where nothing is difficult."""
    product = difficulty * pi
    return product / product.sum() if product.sum() > 0 else pi


def mixed(pi: PerBin, q_david: PerBin, david_share: float) -> PerBin:
    """q = share q_david + (1 - share) pi, with the largest share up to `david_share` that is effective enough."""
    q = david_share * q_david + (1 - david_share) * pi
    while effective_share(pi, q) < LEAST_EFFECTIVE:
        david_share *= 0.95
        q = david_share * q_david + (1 - david_share) * pi
    return q


def effective_share(pi: PerBin, q: PerBin) -> float:
    """Effective sample size per sample, (E_q omega)^2 / E_q omega^2 = 1 / sum_k pi_k^2 / q_k; 1 at q = pi."""
    there = pi > 0
    return float(1 / (pi[there].square() / q[there]).sum())
