"""David as the training loop meets him: fitted companions, one for each block, on the features of one cache."""

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
    """David fitted to the teacher's own features; he assesses and carries no gradient.

    `identity` says which cache, teacher, hook point and configuration he was fitted to, `trials` how well he reads,
    `steps` how many the teacher has.
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
        """What these features say, given the true bin of each sample; raises `Refused` for a block of another width."""
        companion = self.block_model(block)
        if features.shape[1] != len(companion.mean):
            raise Refused(
                f"block {block}: {features.shape[1]} channels, David was fitted to {len(companion.mean)} - fit again"
            )
        said: Posterior = companion(features, bins)
        return said

    def block_model(self, block: str) -> BlockModel:
        """The network of one block."""
        if block not in self._block_models:
            raise Refused(f"block {block}: David was not fitted to it - {did_you_mean(block, self.blocks)}")
        return self._block_models[block]

    def is_reliable(self, block: str, bins: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Whether he can tell the teacher's features of these bins apart, so that his word counts there."""
        return self.block_model(block).reliability[bins] >= self.config.reliability_threshold

    def reference(self, block: str) -> Float[Tensor, "3"]:
        """Timestep error, pattern error and 1 - coherence under noise of half a deviation."""
        return self.block_model(block).reference

    def to(self, device: torch.device) -> "FittedAssessor":
        """The same David on another device."""
        moved = {block: companion.to(device) for block, companion in self._block_models.items()}
        return FittedAssessor(moved, self.identity, self.config, self.fit_metrics, self.steps)
