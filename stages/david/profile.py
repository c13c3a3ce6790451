"""Where along the time David finds the student wrong, and where he can be believed: running means for each bin."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.refusal import Refused
from stages.david.assessment import BlockAssessment, Posterior
from stages.david.fusion import FusionConfig

READINGS = 5

PerBin = Float[Tensor, " T"]


def right(teacher: Mapping[str, Posterior], bins: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Share of the blocks whose likeliest bin of the teacher's own features is the true one or a neighbour of it."""
    off = torch.stack([(said.log_bins.argmax(dim=1) - bins).abs() for said in teacher.values()])
    return (off <= 1).float().mean(dim=0)


class Profile:
    """Means over the blocks and over the samples of each bin; a sample counts half when `memory` more were seen."""

    def __init__(self, fusion: FusionConfig, bins: int, memory: int, device: torch.device | str = "cpu") -> None:
        """The weights of the two errors in the difficulty are those that `fusion` gives them in lambda."""
        self.fusion, self.bins, self.memory = fusion, bins, memory
        self._sums = torch.zeros(READINGS, bins, dtype=torch.float64, device=device)
        self._count = torch.zeros(bins, dtype=torch.float64, device=device)

    def see(
        self, bins: Int[Tensor, " b"], assessed: Mapping[str, BlockAssessment], right: Float[Tensor, " b"]
    ) -> Float[Tensor, "READINGS+1 T"]:
        """Sums over some samples, and their number in each bin; sums of all parts of a batch are learnt from.

        Draws are alike within their bin, so no weight is asked for.
        """
        of_blocks = [(a.excess, a.divergence, a.cross_entropy, a.entropy) for a in assessed.values()]
        means = [torch.stack(readings).mean(dim=0) for readings in zip(*of_blocks, strict=True)]
        # A product with a table of zeros and ones adds up in the same order every time; scattering need not.
        member = F.one_hot(bins, self.bins).to(self._sums)
        return torch.cat([torch.stack([*means, right]).to(self._sums) @ member, member.sum(dim=0, keepdim=True)])

    def learn(self, sums: Float[Tensor, "READINGS+1 T"], samples: int) -> None:
        """Take in what was seen of so many samples."""
        kept = 2.0 ** (-samples / self.memory)
        self._sums = kept * self._sums + sums[:READINGS]
        self._count = kept * self._count + sums[READINGS]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen yet."""
        return not bool(self._count.any())

    def trusted(self, threshold: float) -> Bool[Tensor, " T"]:
        """The bins that were seen, and in which David finds at least this share of the teacher's own features."""
        return (self._count > 0) & (self._means()[4] >= threshold)

    def difficulty(self, threshold: float) -> PerBin:
        """alpha e_t + beta e_p of each bin, drawn towards the mean of all; a bin that is not trusted gets that mean.

        A bin is believed half when it was seen as often as `memory` samples would see it if all bins came alike. Zero
        everywhere as long as no bin is trusted.
        """
        trusted = self.trusted(threshold)
        if not trusted.any():
            return torch.zeros_like(self._count)
        errors, prior = self._sums[:2], self.memory / self.bins
        overall = errors[:, trusted].sum(dim=1, keepdim=True) / self._count[trusted].sum()
        excess, divergence = (errors + prior * overall) / (self._count + prior)
        found = self._weighted(excess, divergence)
        return torch.where(trusted, found, found[trusted].mean())

    def raw_difficulty(self) -> PerBin:
        """The same mixture of the original's quantities, cross-entropy and entropy; nothing is drawn to anything."""
        _, _, cross_entropy, entropy, _ = self._means()
        return self._weighted(cross_entropy, entropy)

    def _means(self) -> Float[Tensor, "READINGS T"]:
        return torch.where(self._count > 0, self._sums / self._count, 0.0)

    def _weighted(self, nats: PerBin, share: PerBin) -> PerBin:
        return self.fusion.alpha * (nats / math.log(self.bins)).clamp(0, 1) + self.fusion.beta * share

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"sums": self._sums.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        if state["sums"].shape != self._sums.shape:
            raise Refused(f"David's profile has {state['sums'].shape[-1]} bins of time, this David has {self.bins}")
        self._sums, self._count = state["sums"].to(self._sums, copy=True), state["count"].to(self._count, copy=True)
