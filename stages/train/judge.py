"""Who decides, step by step, how much each block and each sample counts."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from stages.nets.student import StudentOutput


class Judge(Protocol):
    """Asked at every step, within the step's no_grad; what he remembers goes into the checkpoint.

    What he says at a step rests on the steps before it: he hears a step's micro-batches on all processes before he
    learns from their sum, so that all processes hold the same judge.
    """

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """One weight for each block; `static` are those of the configuration."""
        ...

    def omega(self, batch: Batch) -> Float[Tensor, " b"]:
        """The weight of each sample, not normalised inside the batch."""
        ...

    def hear(self, batch: Batch, output: StudentOutput, omega: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """What he hears in a micro-batch, as tensors that add up over micro-batches and processes."""
        ...

    def learn(self, heard: Sequence[Tensor], samples: int) -> None:
        """Take in the sums over a whole step of so many samples."""
        ...

    def told(self) -> Mapping[str, Any]:
        """What he has to say to the journal: names, and numbers or mappings of numbers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes in him: tensors and plain numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        ...


class Nobody:
    """Nobody judges: each block counts as configured, and every sample alike."""

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """Those of the configuration."""
        return static

    def omega(self, batch: Batch) -> Float[Tensor, " b"]:
        """One each."""
        return torch.ones_like(batch.s)

    def hear(self, _batch: Batch, _output: StudentOutput, _omega: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """Nothing."""
        return ()

    def learn(self, _heard: Sequence[Tensor], _samples: int) -> None:
        """Nothing is learnt."""

    def told(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """Nothing is taken over."""
