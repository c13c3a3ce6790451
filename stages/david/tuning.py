"""What a fitted companion learns from prompts that did not teach him: how sure to be, and how far to trust himself."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stages.david.assessment import soft_targets
from stages.david.companion import Companion
from stages.david.patterns import PatternSpace
from stages.david.states import States
from stages.david.trial import noised, respond

FACTORS = torch.logspace(-0.5, 0.5, 101)
"""Temperatures tried, as multiples of the fitted one: from a third to three times."""
REFERENCE_NOISE = 0.5


@torch.no_grad()
def tune(companion: Companion, states: States, space: PatternSpace, seed: int) -> None:
    """Scale both temperatures to the best likelihood on `states`; note reliability and reference responses."""
    labels = space.label(companion.standardise(states.features), states.s)
    count, patterns = len(companion.reliability), len(companion.patterns.vertices)
    said = companion(states.features, states.bins)
    companion.bins.temperature.mul_(best_factor(said.log_bins, soft_targets(states.bins, count)))
    companion.patterns.temperature.mul_(best_factor(said.log_patterns, F.one_hot(labels, patterns).float()))

    companion.reliability.copy_(reliability(said.log_bins.argmax(dim=1), states.bins, count))
    generator = torch.Generator().manual_seed(seed)
    noise = noised(companion, states.features, REFERENCE_NOISE, generator)
    companion.reference.copy_(torch.tensor(respond(companion, noise, states.features, states.bins)))


def best_factor(log_posterior: Float[Tensor, "m K"], targets: Float[Tensor, "m K"]) -> Tensor:
    """The factor of the temperature that gives the smallest cross-entropy to `targets`."""
    costs = [-(targets * torch.log_softmax(log_posterior / factor, dim=1)).sum(dim=1).mean() for factor in FACTORS]
    return FACTORS[torch.stack(costs).argmin()]


def reliability(answers: Int[Tensor, " m"], bins: Int[Tensor, " m"], count: int) -> Float[Tensor, " T"]:
    """Share of answers within one bin of the truth, for each bin; the share of all bins counts as one more state."""
    near = ((answers - bins).abs() <= 1).float()
    hits, seen = torch.bincount(bins, near, minlength=count), torch.bincount(bins, minlength=count)
    return ((hits + near.mean()) / (seen + 1)).float()
