"""What the teacher's features say apart from the time: content patterns, found by clustering."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

COSINES, COMPONENTS, ROUNDS = 12, 16, 20
RIDGE, LEAST_VARIANCE = 1e-3, 1e-3


@dataclass(frozen=True)
class PatternSpace:
    """Standardised features -> freed from time -> principal components -> the nearest centre.

    Freed of its mean at that time alone, content still says the time by how far it spreads: with the spread taken away
    too, one prompt keeps its pattern through time more often (.56 against .33 in the embedded world's first block).
    """

    mean_of_time: Float[Tensor, "cosines n"]
    variance_of_time: Float[Tensor, "cosines n"]
    axes: Float[Tensor, "n components"]
    centres: Float[Tensor, "P components"]

    @classmethod
    def fit(
        cls, features: Float[Tensor, "m n"], s: Float[Tensor, " m"], count: int, generator: torch.Generator
    ) -> "PatternSpace":
        """Two ridge regressions on cosines of s, principal components, then `count` centres (after david.md 7.2)."""
        mean = _regress(s, features.double())
        variance = _regress(s, (features - cosines(s) @ mean).square())
        content = _freed(features, s, mean, variance)
        _, axes = torch.linalg.eigh(content.T @ content / len(content))
        axes = axes[:, -COMPONENTS:].flip(1)
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # eigenvectors come with either sign
        return cls(mean, variance, axes, k_means(content @ axes, count, generator))

    def label(self, features: Float[Tensor, "m n"], s: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """The pattern of each sample, from 0."""
        content = _freed(features, s, self.mean_of_time, self.variance_of_time)
        return torch.cdist(content @ self.axes, self.centres).argmin(dim=1)


def cosines(s: Float[Tensor, " m"]) -> Float[Tensor, "m cosines"]:
    """cos(pi j s) for j = 0, 1, ...: anything that varies smoothly with time."""
    return torch.cos(math.pi * torch.arange(COSINES, dtype=torch.float64) * s.double()[:, None])


def _regress(s: Float[Tensor, " m"], values: Float[Tensor, "m n"]) -> Float[Tensor, "cosines n"]:
    basis = cosines(s)
    ridge = RIDGE * len(s) * torch.eye(COSINES, dtype=torch.float64)
    coefficients: Tensor = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ values)
    return coefficients


def _freed(
    features: Float[Tensor, "m n"],
    s: Float[Tensor, " m"],
    mean: Float[Tensor, "cosines n"],
    variance: Float[Tensor, "cosines n"],
) -> Float[Tensor, "m n"]:
    basis = cosines(s)
    return (features - basis @ mean) / (basis @ variance).clamp_min(LEAST_VARIANCE).sqrt()


def k_means(points: Float[Tensor, "m d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """Centres by Lloyd's rounds from k-means++ seeds; a centre with no point of its own moves to the farthest point."""
    centres = _seeds(points, count, generator)
    for _ in range(ROUNDS):
        distance, nearest = torch.cdist(points, centres).min(dim=1)
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], points[distance.argmax()])
    return centres


def _seeds(points: Float[Tensor, "m d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """k-means++: each next seed is drawn with a probability that grows with its squared distance to those before."""
    chosen = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        away = torch.cdist(points, chosen).amin(dim=1).square()
        chosen = torch.cat([chosen, points[torch.multinomial(away + 1e-12, 1, generator=generator)]])
    return chosen
