"""Whether David was heard: how much lambda varied because of him."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.david.fusion import PerBlock

SILENT_BELOW = 0.02


def coefficient_of_variation(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over mean along a dimension; a pure number."""
    return values.std(dim=dim, correction=0) / values.mean(dim=dim)


@dataclass(frozen=True)
class Variation:
    """How much lambda varies because of David, over the blocks and over time."""

    over_blocks: float
    over_time: float

    @classmethod
    def of_moments(cls, mean: Float[Tensor, " n_blocks"], square: Float[Tensor, " n_blocks"]) -> "Variation":
        """From the mean and the mean square over time of each block's lambda over that of a faultless student.

        w_b varies over the blocks without David, and is no voice.
        """
        over_time = (square - mean.square()).clamp_min(0).sqrt() / mean
        return cls(float(coefficient_of_variation(mean, 0)), float(over_time.mean()))

    @property
    def silent(self) -> bool:
        """Whether the run was one with static weights."""
        return max(self.over_blocks, self.over_time) < SILENT_BELOW

    def told(self) -> str:
        """One line for the user."""
        said = f"lambda varied by {self.over_blocks:.1%} over the blocks and {self.over_time:.1%} over time"
        return f"David was silent: {said}, as static weights do" if self.silent else f"David spoke: {said}"


class Emphasis:
    """Running moments of each block's lambda over that of a faultless student."""

    def __init__(self, quiet: PerBlock) -> None:
        self._quiet, self._steps = quiet.double(), 0
        self._sums = torch.zeros(2, len(quiet), dtype=torch.float64, device=quiet.device)

    def see(self, lambdas: PerBlock) -> None:
        """Count the lambdas of one step in."""
        emphasis = lambdas.double() / self._quiet
        self._sums = self._sums + torch.stack([emphasis, emphasis.square()])
        self._steps += 1

    def variation(self, counted: Bool[Tensor, " n_blocks"]) -> Variation | None:
        """How much the lambdas of these blocks varied so far; None before the first step.

        What is said of a block whose loss has weight 0 is no voice.
        """
        return Variation.of_moments(*(self._sums[:, counted] / self._steps)) if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"steps": self._steps, "sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self._steps = int(state["steps"])
        self._sums = state["sums"].to(self._sums, copy=True)
