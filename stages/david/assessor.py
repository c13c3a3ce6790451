"""David as the training loop meets him: fitted companions, one for each block, on the features of one cache."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.refusal import Refused, did_you_mean
from shards.recipe import Recipe
from stages.david.assessment import Posterior
from stages.david.companion import Companion, FitConfig
from stages.david.trial import Trial


class Fitted:
    """David fitted to the teacher's own features; he assesses and carries no gradient.

    `identity` says which cache, teacher, hook point and configuration he was fitted to, `trials` how well he reads,
    `steps` how many the teacher has.
    """

    def __init__(
        self,
        companions: Mapping[str, Companion],
        identity: Recipe,
        config: FitConfig,
        trials: Mapping[str, Trial],
        steps: int,
    ) -> None:
        self._companions, self.identity, self.config, self.trials = companions, identity, config, trials
        self.bins, self.steps, self.patterns, self.blocks = config.bins, steps, config.patterns, tuple(companions)

    @torch.no_grad()
    def posterior(self, block: str, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """What these features say, given the true bin of each sample; raises `Refused` for a block of another width."""
        companion = self.companion(block)
        if features.shape[1] != len(companion.mean):
            raise Refused(
                f"block {block}: {features.shape[1]} channels, David was fitted to {len(companion.mean)} - fit again"
            )
        said: Posterior = companion(features, bins)
        return said

    def companion(self, block: str) -> Companion:
        """The network of one block."""
        if block not in self._companions:
            raise Refused(f"block {block}: David was not fitted to it - {did_you_mean(block, self.blocks)}")
        return self._companions[block]

    def reliable(self, block: str, bins: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Whether he can tell the teacher's features of these bins apart, so that his word counts there."""
        return self.companion(block).reliability[bins] >= self.config.reliability_threshold

    def reference(self, block: str) -> Float[Tensor, "3"]:
        """Timestep error, pattern error and 1 - coherence under noise of half a deviation."""
        return self.companion(block).reference

    def to(self, device: torch.device) -> "Fitted":
        """The same David on another device."""
        moved = {block: companion.to(device) for block, companion in self._companions.items()}
        return Fitted(moved, self.identity, self.config, self.trials, self.steps)
