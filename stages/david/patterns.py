"""The states of a cache that David is fitted to, split by prompt, and content patterns: clusters of their features."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.table import Table
from stages.flow.timesteps import bin_of_step
from stages.system.refusal import Refused


@dataclass(frozen=True)
class BlockStates:
    """m states of the teacher: one block's features, times, and prompts."""

    features: Float[Tensor, "m n"]
    s: Float[Tensor, " m"]
    bins: Int[Tensor, " m"]
    key: Int[Tensor, " m"]
    """the prompt of each"""

    @classmethod
    def from_table(cls, table: Table, block: str, rows: Int[np.ndarray, " m"], bins: int, steps: int) -> "BlockStates":
        """Rows of a table; `steps` are the teacher's. Raises `Refused` when a feature is not finite."""
        features = table.features(block, rows).float()
        if not features.isfinite().all():
            raise Refused(f"block {block}: the cache holds features that are not finite - make the cache again")
        k, s, key = (torch.from_numpy(column[rows]) for column in (table.k, table.s, table.key))
        return cls(features, s, bin_of_step(k, bins, steps), key)


@dataclass(frozen=True)
class RowSplit:
    """Rows of a table; no prompt is in two parts."""

    training: Int[np.ndarray, " m"]
    tuning: Int[np.ndarray, " h"]
    """for temperatures, reliability and reference responses"""
    validation: Int[np.ndarray, " v"]
    """for the report alone"""


def split_rows(table: Table, held_out: float, max_states: int, seed: int) -> RowSplit:
    """Of the training prompts in a random order a share `held_out` is for tuning, the others for training.

    No part has more than about `max_states` states. Raises `Refused` when one of the three is empty.
    """
    train, validation = table.rows("train"), table.rows("validation")
    keys = np.unique(table.key[train])
    prompts = max(1, max_states * len(keys) // max(1, len(train)))
    order = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).numpy()]
    tuning_keys, training_keys = np.split(order, [round(held_out * len(order))])
    training, tuning = (train[np.isin(table.key[train], chosen[:prompts])] for chosen in (training_keys, tuning_keys))
    for split, rows in (("train", training), ("train", tuning), ("validation", validation)):
        if not len(rows):
            raise Refused(
                f"david: too few prompts in the {split} split ({len(keys)} for training) - make a larger cache"
            )
    return RowSplit(training, tuning, validation[:max_states])


COSINES, COMPONENTS, KMEANS_ITERATIONS = 12, 16, 20
RIDGE, MIN_VARIANCE = 1e-3, 1e-3


@dataclass(frozen=True)
class PatternSpace:
    """Standardised features -> time dependence removed -> principal components -> the nearest centre.

    Both mean and variance at a time are removed: without the variance's, one prompt keeps its pattern through time less
    often (.33 against .56 in the embedded world's first block).
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
        content = _remove_time_dependence(features, s, mean, variance)
        _, axes = torch.linalg.eigh(content.T @ content / len(content))
        axes = axes[:, -COMPONENTS:].flip(1)
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # the sign of an eigenvector is arbitrary
        return cls(mean, variance, axes, k_means(content @ axes, count, generator))

    def label(self, features: Float[Tensor, "m n"], s: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
        """The pattern of each sample, from 0."""
        content = _remove_time_dependence(features, s, self.mean_of_time, self.variance_of_time)
        return torch.cdist(content @ self.axes, self.centres).argmin(dim=1)


def cosines(s: Float[Tensor, " m"]) -> Float[Tensor, "m cosines"]:
    """cos(pi j s) for j = 0, 1, ...: a basis of smooth functions of time."""
    return torch.cos(math.pi * torch.arange(COSINES, dtype=torch.float64) * s.double()[:, None])


def _regress(s: Float[Tensor, " m"], values: Float[Tensor, "m n"]) -> Float[Tensor, "cosines n"]:
    basis = cosines(s)
    ridge = RIDGE * len(s) * torch.eye(COSINES, dtype=torch.float64)
    coefficients: Tensor = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ values)
    return coefficients


def _remove_time_dependence(
    features: Float[Tensor, "m n"],
    s: Float[Tensor, " m"],
    mean: Float[Tensor, "cosines n"],
    variance: Float[Tensor, "cosines n"],
) -> Float[Tensor, "m n"]:
    basis = cosines(s)
    return (features - basis @ mean) / (basis @ variance).clamp_min(MIN_VARIANCE).sqrt()


def k_means(points: Float[Tensor, "m d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """Centres by Lloyd's iterations from k-means++ seeds; an empty cluster's centre moves to the farthest point."""
    centres = _kmeans_plus_plus(points, count, generator)
    for _ in range(KMEANS_ITERATIONS):
        distance, nearest = torch.cdist(points, centres).min(dim=1)
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], points[distance.argmax()])
    return centres


def _kmeans_plus_plus(points: Float[Tensor, "m d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """k-means++: each next seed is sampled in proportion to its squared distance to those before."""
    chosen = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        away = torch.cdist(points, chosen).amin(dim=1).square()
        chosen = torch.cat([chosen, points[torch.multinomial(away + 1e-12, 1, generator=generator)]])
    return chosen
