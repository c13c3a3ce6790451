"""The network of one block: features -> a point on the unit sphere -> posteriors over pentachora."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from configs.values import Strict
from stages.david.assessment import Posterior
from stages.david.geometry import barycentric_gradients, inclusion_ratio, role_directions

HIDDEN_WIDTH = 128
CLIP = 6.0
"""Bound of standardised features, so that huge activations stay finite errors."""
INITIAL_TEMPERATURE = 0.2


class FitConfig(Strict):
    """How David is fitted to a cache (after david.md 7.1 to 7.3)."""

    bins: int = Field(100, ge=2, description="time bins T to classify, equal parts of the teacher's steps")
    patterns: int = Field(
        10, ge=2, description="content patterns P, clusters of the teacher's features with the time removed"
    )
    dimensions: int = Field(32, ge=5, description="dimensions of the unit sphere that features are projected to")
    steps: int = Field(500, ge=1, description="optimizer steps for each block")
    batch_size: int = Field(512, ge=1, description="states in a step")
    learning_rate: float = Field(6e-3, gt=0, description="peak learning rate; it rises for 20 steps and ends at 0")
    noise: float = Field(
        0.3, ge=0, description="largest noise on half of the training states, in deviations of each channel; 0 for none"
    )
    held_out: float = Field(1 / 6, gt=0, lt=1, description="share of the training prompts kept for tuning, 0..1")
    most_states: int = Field(50_000, ge=1, description="training states at most; whole prompts, chosen by the seed")
    reliability_threshold: float = Field(
        0.15,
        ge=0,
        le=1,
        description="a bin predicted within one bin less often than this does not count in its block",
    )
    seed: int = Field(0, ge=0, description="decides the held-out prompts, the clusters and the first weights")


class PentachoronClassifier(nn.Module):
    """One pentachoron per class, whose role-weighted score is the logit; there is no other head."""

    def __init__(self, count: int, dimensions: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.vertices = nn.Parameter(F.normalize(torch.randn(count, 5, dimensions, generator=generator), dim=-1))
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    def log_posterior(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b K"]:
        """log softmax_k(z.u_k / tau)."""
        return torch.log_softmax(z @ role_directions(self.vertices).mT / self.temperature, dim=1)

    def unit_vertices(self) -> Float[Tensor, "K 5 d"]:
        """The pentachora with every vertex on the unit sphere."""
        return F.normalize(self.vertices, dim=-1)

    def inclusion_ratio(self, z: Float[Tensor, "b d"], class_index: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Inclusion ratio of each point in its own class's pentachoron."""
        vertices = self.unit_vertices()
        return inclusion_ratio(z, vertices[class_index], barycentric_gradients(vertices)[class_index]).float()


class BlockModel(nn.Module):
    """Classifier of the bins and patterns of a block of width n.

    x^ = clip((x - mean) / deviation, +-6);  z = W2 gelu(W1 x^) on the unit sphere   (david.md 7.1)
    """

    mean: Float[Tensor, " n"]
    deviation: Float[Tensor, " n"]
    reliability: Float[Tensor, " T"]
    """P(|argmax - bin| <= 1) on the teacher's features of prompts that were held out of the fit."""
    reference: Float[Tensor, "3"]
    """Timestep error, pattern error and 1 - coherence of the teacher's features under noise of half their deviation."""

    def __init__(
        self, width: int, bins: int, patterns: int, dimensions: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("reliability", torch.ones(bins))
        self.register_buffer("reference", torch.ones(3))
        self.widen = _make_linear(width, HIDDEN_WIDTH, generator)
        self.narrow = _make_linear(HIDDEN_WIDTH, dimensions, generator)
        self.bins = PentachoronClassifier(bins, dimensions, generator)
        self.patterns = PentachoronClassifier(patterns, dimensions, generator)

    def standardise(self, features: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Features in the teacher's deviations, channel by channel, clipped."""
        return ((features.float() - self.mean) / self.deviation).clamp(-CLIP, CLIP)

    def embed(self, features: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """z, a point on the unit sphere."""
        return F.normalize(self.narrow(F.gelu(self.widen(self.standardise(features)))), dim=-1)

    def forward(self, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """Posteriors, given the true bin of each sample; the same in train and eval mode."""
        z = self.embed(features)
        return Posterior(self.bins.log_posterior(z), self.patterns.log_posterior(z), self.bins.inclusion_ratio(z, bins))


def _make_linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
        layer.bias.zero_()
    return layer
