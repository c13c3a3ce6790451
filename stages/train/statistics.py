"""How far the teacher's features vary, read from the table of a cache."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from shards.moments import Statistics
from shards.table import Table
from stages.train.losses import FeatureScale, floored


def feature_scale(cache: Path, bins: int) -> FeatureScale:
    """Deviations of every pooled channel over the training split, apart for each bin of s."""
    found = Table.open(cache).statistics(bins)
    return FeatureScale({block: _deviations(statistics) for block, statistics in found.items()})


def _deviations(found: Statistics) -> Float[Tensor, "bins n"]:
    """A bin with fewer than two states takes the deviations of all states."""
    overall = found.overall().std()
    return floored(torch.where(found.count > 1, found.std(), overall), overall[0]).float()
