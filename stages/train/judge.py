"""Who decides, batch by batch, how much each block and each sample counts."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from stages.nets.student import StudentOutput


class Judge(Protocol):
    """Asked at every step, within the step's no_grad; what he remembers goes into the checkpoint."""

    def lambdas(
        self, batch: Batch, output: StudentOutput, static: Float[Tensor, " n_blocks"]
    ) -> Float[Tensor, " n_blocks"]:
        """One weight for each block; `static` are those of the configuration."""
        ...

    def omega(self, batch: Batch) -> Float[Tensor, " b"]:
        """The weight of each sample, not normalised inside the batch."""
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

    def lambdas(
        self, _batch: Batch, _output: StudentOutput, static: Float[Tensor, " n_blocks"]
    ) -> Float[Tensor, " n_blocks"]:
        """Those of the configuration."""
        return static

    def omega(self, batch: Batch) -> Float[Tensor, " b"]:
        """One each."""
        return torch.ones_like(batch.s)

    def told(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """Nothing is taken over."""
