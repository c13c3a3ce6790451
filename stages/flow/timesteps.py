"""The density of training times s, bins of times and of teacher steps, and weights w(s) (mathematics.md section 4)."""

from typing import TypeVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from configs.values import Strict

Time = TypeVar("Time", float, Tensor)


def shift_time(s: Time, shift: float) -> Time:
    """Move s towards noise for shift > 1, towards data for shift < 1: s' = S s / (1 + (S - 1) s).

    The inverse is the shift by 1 / S.
    """
    return shift * s / (1 + (shift - 1) * s)


class TimestepDensity(Strict):
    """The density of s: a share that is uniform, the rest a uniform time that was shifted."""

    shift: float = Field(
        default=1.8, gt=0, description="shift S of the shifted share, a pure number; above 1 leans to noise"
    )
    uniform_share: float = Field(default=0.5, ge=0, le=1, description="share of the times that is uniform in s, 0 to 1")

    def quantile(self, u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The time s with cdf(s) = u, where cdf(s) = p s + (1 - p) shift_time(s, 1 / S), p the uniform share.

        With d = S - 1 that is p d s^2 - b s + u S = 0; the root in [0, 1] is written so that it loses no digits where
        p d is zero or small.
        """
        d = self.shift - 1
        b = self.uniform_share * self.shift + (1 - self.uniform_share) + d * u
        root = (b * b - 4 * self.uniform_share * d * self.shift * u).clamp_min(0).sqrt()
        return (2 * self.shift * u / (b + root)).clamp(0, 1)

    def sample(self, n: int, generator: torch.Generator, stratified: bool = False) -> Float[Tensor, " n"]:
        """`n` times in float64; stratified: ascending, one from each n-th of the probability."""
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        if stratified:
            u = (torch.arange(n, dtype=torch.float64, device=u.device) + u) / n
        return self.quantile(u)


def bin_of_time(s: Float[Tensor, " b"], bins: int) -> Int[Tensor, " b"]:
    """The bin, 0 to bins - 1, of a path time s in [0, 1]."""
    return (s * bins).floor().long().clamp(0, bins - 1)


def bin_of_step(k: Int[Tensor, " b"], bins: int, steps: int) -> Int[Tensor, " b"]:
    """The bin, 0 to bins - 1, of step k of a teacher with `steps` steps: k bins // steps."""
    return (k.long() * bins // steps).clamp(0, bins - 1)


def min_snr_weight(s: Float[Tensor, " b"], gamma: float) -> Float[Tensor, " b"]:
    """Min-SNR weight of a velocity error on the linear path: min((1 - s)^2, gamma s^2)."""
    return torch.minimum((1 - s) ** 2, gamma * s**2)


def v_prediction_weight(s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Turns a squared velocity error into that of v-prediction: v = g v_vp + ..., so 1 / g^2 = s^2 + (1 - s)^2."""
    return s**2 + (1 - s) ** 2
