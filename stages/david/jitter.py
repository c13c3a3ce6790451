"""David's choice of times as a continuous density, for sources that can make a state at any time; a cache cannot."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.david.profile import PerBin
from stages.david.sampling import SamplingConfig
from stages.flow.timesteps import shift

STEPS = 1000


@dataclass(frozen=True)
class JitteredTimes:
    """f(t) = share sum_k q_k U(t; c_k +- w_k) + (1 - share) pi(t), t in the teacher's steps, 0 to 1000.

    Intervals end at 0 and 1000, and neighbours overlap where the jitter is wide. pi, constant in each bin, is mixed in
    as a density, so pi / f <= 1 / (1 - share) even where a narrow jitter leaves gaps.
    """

    pi: PerBin
    q_david: PerBin
    half_width: PerBin
    """w_k, in the teacher's steps"""
    share: float

    @classmethod
    def of(cls, config: SamplingConfig, pi: PerBin, q_david: PerBin, entropy: PerBin) -> "JitteredTimes":
        """With the knobs of the original: half-width = base_jitter (1 + entropy) if chaos is adaptive."""
        chaos = entropy if config.adaptive_chaos else torch.zeros_like(entropy)
        return cls(pi, q_david, config.base_jitter * (1 + chaos), config.david_share)

    def pdf(self, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """f(t), per step."""
        low, high = self._intervals()
        inside = (low <= t[:, None]) & (t[:, None] < high)
        return self.share * (inside * (self.q_david / (high - low))).sum(dim=1) + (1 - self.share) * self.target(t)

    def target(self, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """pi(t), per step."""
        bins = len(self.pi)
        return self.pi[(t * bins / STEPS).long().clamp(0, bins - 1)] * bins / STEPS

    def omega(self, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """pi(t) / f(t): the weight of a draw at t, not normalised inside a batch."""
        return self.target(t) / self.pdf(t)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """`n` times of density f."""
        low, high = self._intervals()
        edges = torch.linspace(0, STEPS, len(self.pi) + 1, dtype=torch.float64)
        weights = torch.cat([self.share * self.q_david, (1 - self.share) * self.pi])
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator)
        low, high = torch.cat([low, edges[:-1]])[chosen], torch.cat([high, edges[1:]])[chosen]
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    def _intervals(self) -> tuple[PerBin, PerBin]:
        bins = len(self.pi)
        centre = (torch.arange(bins, dtype=torch.float64) + 0.5) * STEPS / bins
        return (centre - self.half_width).clamp_min(0), (centre + self.half_width).clamp_max(STEPS)


def original_times(times: JitteredTimes, factor: float, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """The original's biased draws: bins by difficulty alone, jitter, then the shift; nothing corrects for them."""
    alone = JitteredTimes(times.pi, times.q_david, times.half_width, share=1.0)
    return shift(alone.sample(n, generator) / STEPS, factor) * STEPS
