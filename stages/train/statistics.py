"""How far the teacher's features vary, read from the table of a cache."""

from pathlib import Path

import torch

from shards.table import Table
from stages.train.losses import FeatureScale


def feature_scale(cache: Path, bins: int) -> FeatureScale:
    """Deviations of every pooled channel over the training split, apart for each bin of s."""
    table = Table.open(cache)
    rows = table.rows("train")
    features = {block: table.features(block, rows) for block in table.blocks}
    return FeatureScale.measure(features, torch.from_numpy(table.s[rows]), bins)
