"""Which states of a cache teach David, which tune him and which judge him: whole prompts each, never rows of one."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.refusal import Refused
from shards.table import Table
from stages.flow.timesteps import bin_of_step


@dataclass(frozen=True)
class States:
    """m states of the teacher, as one block saw them."""

    features: Float[Tensor, "m n"]
    s: Float[Tensor, " m"]
    bins: Int[Tensor, " m"]
    key: Int[Tensor, " m"]
    """the prompt that each belongs to"""

    @classmethod
    def of(cls, table: Table, block: str, rows: Int[np.ndarray, " m"], bins: int, steps: int) -> "States":
        """Rows of a table of a teacher with so many `steps`; raises `Refused` when a feature is not finite."""
        features = table.features(block, rows).float()
        if not features.isfinite().all():
            raise Refused(f"block {block}: the cache holds features that are not finite - make the cache again")
        k, s, key = (torch.from_numpy(column[rows]) for column in (table.k, table.s, table.key))
        return cls(features, s, bin_of_step(k, bins, steps), key)


@dataclass(frozen=True)
class Rows:
    """Rows of a table."""

    teaching: Int[np.ndarray, " m"]
    tuning: Int[np.ndarray, " h"]
    """for temperatures, reliability and reference responses"""
    judging: Int[np.ndarray, " v"]
    """for nothing but the report"""


def split_rows(table: Table, held_out: float, most: int, seed: int) -> Rows:
    """The training prompts in a random order: a share `held_out` of them tunes, the others teach; the validation split
    judges. No part has more than about `most` states. Raises `Refused` when one of the three is empty.
    """
    train, judging = table.rows("train"), table.rows("validation")
    keys = np.unique(table.key[train])
    prompts = max(1, most * len(keys) // max(1, len(train)))
    order = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).numpy()]
    tuned, taught = np.split(order, [round(held_out * len(order))])
    teaching, tuning = (train[np.isin(table.key[train], chosen[:prompts])] for chosen in (taught, tuned))
    for split, rows in (("train", teaching), ("train", tuning), ("validation", judging)):
        if not len(rows):
            raise Refused(
                f"david: too few prompts in the {split} split ({len(keys)} for training) - make a larger cache"
            )
    return Rows(teaching, tuning, judging[:most])
