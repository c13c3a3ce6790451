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
    def of(cls, told: Float[Tensor, "lines n_blocks"], quiet: PerBlock) -> "Variation":
        """Of the lambdas of a journal after the warm-up, relative to those of a faultless student.

        w_b varies over the blocks without David, and is no voice.
        """
        emphasis = told.double() / quiet.double()
        return cls.of_moments(emphasis.mean(dim=0), emphasis.square().mean(dim=0))

    @classmethod
    def of_moments(cls, mean: Float[Tensor, " n_blocks"], square: Float[Tensor, " n_blocks"]) -> "Variation":
        """From the mean and the mean square over time of each block's lambda over that of a faultless student."""
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
    """Running moments of each block's lambda over that of a faultless student, from the end of the warm-up on."""

    def __init__(self, quiet: PerBlock, warmup_samples: int) -> None:
        self._quiet, self._warmup = quiet.double(), warmup_samples
        self._samples, self._steps = 0, 0
        self._sums = torch.zeros(2, len(quiet), dtype=torch.float64, device=quiet.device)

    def see(self, lambdas: PerBlock, samples: int) -> None:
        """Count the lambdas of one step in."""
        if self._samples >= self._warmup:
            emphasis = lambdas.double() / self._quiet
            self._sums = self._sums + torch.stack([emphasis, emphasis.square()])
            self._steps += 1
        self._samples += samples

    def variation(self, counted: Bool[Tensor, " n_blocks"]) -> Variation | None:
        """How much the lambdas of these blocks varied so far; None within the warm-up.

        What is said of a block whose loss has weight 0 is no voice.
        """
        return Variation.of_moments(*(self._sums[:, counted] / self._steps)) if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"samples": self._samples, "steps": self._steps, "sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self._samples, self._steps = int(state["samples"]), int(state["steps"])
        self._sums = state["sums"].to(self._sums, copy=True)
