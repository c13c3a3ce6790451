"""Where rows come from: a split held in memory column by column, or records read one by one as they are asked for."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from shards.batch import Batch, collate
from shards.record import Record

Indices = Int[np.ndarray, " n"]


class Rows(Protocol):
    """Something that can hand over any draws of any records of a split."""

    def take(self, records: Indices, draws: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        ...


class ReadRows:
    """Records read when they are asked for; the latest ones stay decoded."""

    def __init__(self, read: Callable[[int], Record], most: int) -> None:
        """`read` gives record number n; at most `most` of them stay in memory."""
        self._read = lru_cache(maxsize=most)(read)

    def take(self, records: Indices, draws: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        return collate([self._read(int(number)) for number in records], [int(draw) for draw in draws])


class Columns:
    """A whole split in memory, one tensor for each field, so that a batch is a selection."""

    def __init__(self, records: Iterable[Record], starts: Indices) -> None:
        """`starts` is the first row of each record, and after the last one the number of all rows."""
        self._starts = torch.from_numpy(starts)
        self._keys: list[str] = []
        self._texts: list[str] = []
        self._class_names: list[str] = []
        self._features: dict[str, Tensor] = {}
        for number, record in enumerate(records):
            if number == 0:
                self._make_room(record, len(starts) - 1, int(starts[-1]))
            self._put(number, record, slice(int(starts[number]), int(starts[number + 1])))

    def take(self, records: Indices, draws: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        numbers, draw = torch.from_numpy(records), torch.from_numpy(draws)
        rows = self._starts[numbers] + draw
        listed = records.tolist()
        return Batch(
            keys=tuple(self._keys[number] for number in listed),
            texts=tuple(self._texts[number] for number in listed),
            class_names=tuple(self._class_names[number] for number in listed),
            cond=self._cond.index_select(0, numbers),
            x_t=self._x_t.index_select(0, rows),
            v_cond=self._v_cond.index_select(0, rows),
            v_uncond=self._v_uncond.index_select(0, rows),
            s=self._s.index_select(0, rows),
            k=self._k.index_select(0, rows),
            features={block: values.index_select(0, rows) for block, values in self._features.items()},
            draw=draw,
        )

    def _make_room(self, like: Record, records: int, rows: int) -> None:
        def room(values: Tensor) -> Tensor:
            return torch.empty(rows, *values.shape[1:], dtype=values.dtype)

        draws = like.draws
        self._cond = torch.empty(records, *like.cond.shape, dtype=like.cond.dtype)
        self._x_t, self._v_cond, self._v_uncond = room(draws.x_t), room(draws.v_cond), room(draws.v_uncond)
        self._s, self._k = room(draws.s), room(draws.k)
        self._features = {block: room(values) for block, values in like.features.by_block.items()}

    def _put(self, number: int, record: Record, rows: slice) -> None:
        self._keys.append(record.key)
        self._texts.append(record.text)
        self._class_names.append(record.class_name)
        self._cond[number] = record.cond
        self._x_t[rows], self._v_cond[rows], self._v_uncond[rows] = (
            record.draws.x_t,
            record.draws.v_cond,
            record.draws.v_uncond,
        )
        self._s[rows], self._k[rows] = record.draws.s, record.draws.k
        for block, values in record.features.by_block.items():
            self._features[block][rows] = values
