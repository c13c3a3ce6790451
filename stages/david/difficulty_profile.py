"""A profile of the student's errors in each bin of time: running means of what the assessor measures."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.david.assessment import BlockAssessment
from stages.david.fusion import FusionConfig
from stages.system.refusal import Refused

BIN_QUANTITIES = ("excess", "divergence", "cross_entropy", "entropy", "teacher_accuracy")

PerBin = Float[Tensor, " T"]


class DifficultyProfile:
    """Exponential means over the blocks and over the samples of each bin, with a half-life in samples."""

    def __init__(
        self, fusion: FusionConfig, bins: int, half_life_samples: int, device: torch.device | str = "cpu"
    ) -> None:
        """`fusion` has the weights of the two errors in the difficulty."""
        self.fusion, self.bins, self.half_life_samples = fusion, bins, half_life_samples
        self._sums = torch.zeros(len(BIN_QUANTITIES), bins, dtype=torch.float64, device=device)
        self._count = torch.zeros(bins, dtype=torch.float64, device=device)

    def observe(
        self, bins: Int[Tensor, " b"], assessed: Mapping[str, BlockAssessment]
    ) -> Float[Tensor, "quantities+1 T"]:
        """Sums over some samples, and their number in each bin; these add up over the parts of a batch.

        States of a bin are sampled alike, so they have no weights here.
        """
        means = [torch.stack([getattr(a, name) for a in assessed.values()]).mean(dim=0) for name in BIN_QUANTITIES]
        # A product with a table of zeros and ones adds up in the same order every time; scattering need not.
        member = F.one_hot(bins, self.bins).to(self._sums)
        return torch.cat([torch.stack(means).to(self._sums) @ member, member.sum(dim=0, keepdim=True)])

    def update(self, sums: Float[Tensor, "quantities+1 T"], samples: int) -> None:
        """Take in what was observed of so many samples."""
        kept = 2.0 ** (-samples / self.half_life_samples)
        self._sums = kept * self._sums + sums[:-1]
        self._count = kept * self._count + sums[-1]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed yet."""
        return not bool(self._count.any())

    def reliable_bins(self, threshold: float) -> Bool[Tensor, " T"]:
        """The observed bins in which David classifies at least this share of the teacher's own features rightly."""
        return (self._count > 0) & (self._means()[4] >= threshold)

    def difficulty(self, threshold: float) -> PerBin:
        """alpha e_t + beta e_p of each bin, shrunk towards the mean of all; an unreliable bin gets that mean.

        A bin's own mean has the weight 1/2 after `half_life_samples` / `bins` observations. Zero everywhere as long as
        no bin is reliable.
        """
        reliable = self.reliable_bins(threshold)
        if not reliable.any():
            return torch.zeros_like(self._count)
        errors, prior = self._sums[:2], self.half_life_samples / self.bins
        overall = errors[:, reliable].sum(dim=1, keepdim=True) / self._count[reliable].sum()
        excess, divergence = (errors + prior * overall) / (self._count + prior)
        difficulty = self._combine_errors(excess, divergence)
        return torch.where(reliable, difficulty, difficulty[reliable].mean())

    def raw_difficulty(self) -> PerBin:
        """The same mixture of the original's quantities, cross-entropy and entropy, without shrinkage."""
        _, _, cross_entropy, entropy, _ = self._means()
        return self._combine_errors(cross_entropy, entropy)

    def _means(self) -> Float[Tensor, "quantities T"]:
        return torch.where(self._count > 0, self._sums / self._count, 0.0)

    def _combine_errors(self, nats: PerBin, share: PerBin) -> PerBin:
        return self.fusion.alpha * (nats / math.log(self.bins)).clamp(0, 1) + self.fusion.beta * share

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"sums": self._sums.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        if state["sums"].shape != self._sums.shape:
            raise Refused(f"David's profile has {state['sums'].shape[-1]} bins of time, this David has {self.bins}")
        self._sums, self._count = state["sums"].to(self._sums, copy=True), state["count"].to(self._count, copy=True)
