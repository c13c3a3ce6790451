"""The fitted assessor: one block model for each block, on the features of one cache."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shards.manifest import Recipe
from stages.david.assessment import Posterior
from stages.david.block_model import BlockModel, FitConfig
from stages.david.trial import FitMetrics
from stages.system.refusal import Refused, did_you_mean


class FittedAssessor:
    """David fitted to the teacher's own features; it carries no gradient.

    `identity` holds the cache, teacher, hook point and configuration of the fit, `fit_metrics` its quality per block,
    `steps` is the number of the teacher's steps.
    """

    def __init__(
        self,
        block_models: Mapping[str, BlockModel],
        identity: Recipe,
        config: FitConfig,
        fit_metrics: Mapping[str, FitMetrics],
        steps: int,
    ) -> None:
        self._block_models, self.identity, self.config, self.fit_metrics = block_models, identity, config, fit_metrics
        self.bins, self.steps, self.patterns, self.blocks = config.bins, steps, config.patterns, tuple(block_models)

    @torch.no_grad()
    def posterior(self, block: str, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """Posteriors of these features, given the true bin of each sample; `Refused` for features of another width."""
        model = self.block_model(block)
        if features.shape[1] != len(model.mean):
            raise Refused(
                f"block {block}: {features.shape[1]} channels, David was fitted to {len(model.mean)} - fit again"
            )
        posterior: Posterior = model(features, bins)
        return posterior

    def block_model(self, block: str) -> BlockModel:
        """The network of one block."""
        if block not in self._block_models:
            raise Refused(f"block {block}: David was not fitted to it - {did_you_mean(block, self.blocks)}")
        return self._block_models[block]

    def is_reliable(self, block: str, bins: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Whether the block's features of the teacher are classified well enough in these bins to count there."""
        return self.block_model(block).reliability[bins] >= self.config.reliability_threshold

    def references(self) -> Float[Tensor, "n_blocks 3"]:
        """Timestep error, pattern error and 1 - coherence of each block under noise of half a deviation."""
        references = torch.stack([model.reference for model in self._block_models.values()])
        references[:, 2] = 1 - (1 - references[:, 2])  # rounded as a coherence: earlier runs resume to the same bits
        return references

    def to(self, device: torch.device) -> "FittedAssessor":
        """The same David on another device."""
        moved = {block: model.to(device) for block, model in self._block_models.items()}
        return FittedAssessor(moved, self.identity, self.config, self.fit_metrics, self.steps)
