"""How hard the block term pulls: by its weight alone, or held at a share of the whole pull on the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.train.objective import Losses, ObjectiveConfig

MEASURED_EVERY_SAMPLES = 1280
"""A measurement costs two more backward passes."""
LEAST, MOST = 1e-3, 1e3


class Penalty:
    """The factor on the block term's weight, from gradients that are measured now and then; kept in the checkpoint."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config, self.factor, self._measured_at = config, 1.0, -MEASURED_EVERY_SAMPLES

    def weight(self, progress: float) -> float:
        """Weight of the block term after the share `progress` of training."""
        return self.factor * self.config.annealed_block_weight(progress)

    def measure(
        self, losses: Losses, progress: float, samples: int, parameters: Sequence[nn.Parameter]
    ) -> Sequence[Tensor]:
        """Where that is due, two norms: of the gradient of everything else, and of the block term at block_weight.

        They add up over micro-batches and processes; only their ratio counts.
        """
        weight = self.weight(progress)
        if self.config.block_share is None or weight <= 0 or samples - self._measured_at < MEASURED_EVERY_SAMPLES:
            return ()
        rest = _norm(losses.rest, parameters)
        return rest, _norm(losses.total - losses.rest, parameters) * self.config.block_weight / weight

    def learn(self, measured: Sequence[Tensor], samples: int) -> None:
        """Take in what was measured, if anything; the factor holds from the next step on.

        factor = share / (1 - share) |g| / |g_b|: the geometric mean of what is measured and what was, so that a single
        step moves it half.
        """
        share = self.config.block_share
        if not measured or share is None:
            return
        rest, blocks = measured
        if bool(torch.isfinite(rest) & torch.isfinite(blocks)) and float(blocks) > 0:
            found = float(share / (1 - share) * rest / blocks)
            first = self._measured_at < 0
            self.factor = min(MOST, max(LEAST, found if first else (found * self.factor) ** 0.5))
        self._measured_at = samples

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"factor": self.factor, "measured_at": self._measured_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self.factor, self._measured_at = float(state["factor"]), int(state["measured_at"])


def _norm(loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """Norm of a loss's gradient over all parameters; the graph stays."""
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
