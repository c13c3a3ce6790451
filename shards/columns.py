"""Where rows come from: a split held in memory column by column, or draws read one by one as they are asked for."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from shards.archive import Place
from shards.batch import Batch
from shards.damage import Damaged
from shards.entries import Shard
from shards.layout import FEATURES, PER_PROMPT, Head, Layout, Part
from shards.opened import OpenShards
from shards.record import Record

Indices = Int[np.ndarray, " n"]

MOST_HEADS = 1 << 16
"""Records whose words and places stay in memory: some 50 MB."""
GAP_BYTES = 16 << 10
"""To read over this much costs less than to ask for a second read."""
SINK = memoryview(bytearray(GAP_BYTES))
"""Where gaps are read to; nobody looks."""


class Rows(Protocol):
    """Something that can hand over any draws of any records of a split."""

    def take(self, records: Indices, draws: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        ...


class Slices:
    """Draws read when they are asked for, each straight from its shard into its row of the batch.

    Nothing is decoded or kept: what was read lately lies in the memory of the operating system.
    """

    def __init__(self, shards: OpenShards, locate: Callable[[int], tuple[Shard, Place]], pinned: bool) -> None:
        """`locate` says where record number n lies; `pinned` rows can be copied to a GPU while it computes."""
        self._shards, self._locate, self._pinned = shards, locate, pinned
        self._head = lru_cache(maxsize=MOST_HEADS)(self._read_head)

    def take(self, records: Indices, draws: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        heads = [self._head(number) for number in records.tolist()]
        listed = draws.tolist()
        names = large_parts(heads[0].blocks)
        parts = heads[0].layout.parts
        room = {name: self._room(len(heads), parts[name]) for name in names}
        bytes_of = {name: memoryview(values.view(torch.uint8).numpy().data).cast("B") for name, values in room.items()}
        for row, (number, head, draw) in enumerate(zip(records.tolist(), heads, listed, strict=True)):
            shard, place = self._locate(number)
            for first, size, pieces in runs(head.layout, names, draw):
                buffers = [
                    bytes_of[name][row * length : (row + 1) * length] if name else SINK[:length]
                    for name, length in pieces
                ]
                self._shards.read_into(shard, place.st_offset + first, buffers, size)
        return Batch(
            keys=tuple(head.key for head in heads),
            texts=tuple(head.text for head in heads),
            class_names=tuple(head.class_name for head in heads),
            cond=room["cond"],
            x_t=room["x_t"],
            v_cond=room["v_cond"],
            v_uncond=room["v_uncond"],
            s=torch.tensor([head.s[draw] for head, draw in zip(heads, listed, strict=True)], dtype=torch.float32),
            k=torch.tensor([head.k[draw] for head, draw in zip(heads, listed, strict=True)], dtype=torch.int64),
            features={block: room[f"{FEATURES}{block}"] for block in heads[0].blocks},
            draw=torch.from_numpy(draws),
        )

    def _room(self, rows: int, part: Part) -> Tensor:
        return torch.empty(rows, *part.shape, dtype=part.dtype, pin_memory=self._pinned)

    def _read_head(self, number: int) -> Head:
        return self._shards.head(*self._locate(number))


def large_parts(blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors of a row that are read for it alone."""
    return ("cond", "x_t", "v_cond", "v_uncond", *(f"{FEATURES}{block}" for block in blocks))


@lru_cache(maxsize=1024)
def runs(layout: Layout, names: tuple[str, ...], draw: int) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """(first byte, bytes, pieces) of every read that one draw takes; a piece without a name fills a small gap."""
    spans = []
    for name in names:
        part = layout.parts[name]
        first = part.offset + (0 if name in PER_PROMPT else draw * part.row_bytes)
        spans.append((first, part.row_bytes, name))
    found: list[tuple[int, int, list[tuple[str, int]]]] = []
    for first, size, name in sorted(spans):
        start, length, pieces = found[-1] if found else (0, 0, [])
        gap = first - start - length
        if found and 0 <= gap <= GAP_BYTES:
            pieces += [("", gap), (name, size)] if gap else [(name, size)]
            found[-1] = (start, length + gap + size, pieces)
        else:
            found.append((first, size, [(name, size)]))
    return found


class Columns:
    """A whole split in memory, one tensor for each field, so that a batch is a selection."""

    def __init__(self, records: Iterable[Record], starts: Indices, pinned: bool, most_bytes: int) -> None:
        """`starts` is the first row of each record, and after the last one the number of all rows.

        Raises `Damaged` when the first record is so large that as many of them would not fit into `most_bytes`, which
        the shards take.
        """
        self._starts, self._pinned = torch.from_numpy(starts), pinned
        self._keys: list[str] = []
        self._texts: list[str] = []
        self._class_names: list[str] = []
        self._features: dict[str, Tensor] = {}
        for number, record in enumerate(records):
            if number == 0:
                _refuse_outsized(record, len(starts) - 1, int(starts[-1]), most_bytes)
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
            cond=self._select(self._cond, numbers),
            x_t=self._select(self._x_t, rows),
            v_cond=self._select(self._v_cond, rows),
            v_uncond=self._select(self._v_uncond, rows),
            s=self._s.index_select(0, rows),
            k=self._k.index_select(0, rows),
            features={block: self._select(values, rows) for block, values in self._features.items()},
            draw=draw,
        )

    def _select(self, values: Tensor, rows: Tensor) -> Tensor:
        """These rows, in memory that a GPU can copy from while it computes, where there is one."""
        room = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=self._pinned)
        return torch.index_select(values, 0, rows, out=room)

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


def _refuse_outsized(like: Record, records: int, rows: int, most_bytes: int) -> None:
    draws = like.draws
    per_draw = [draws.x_t, draws.v_cond, draws.v_uncond, draws.s, draws.k, *like.features.by_block.values()]
    needed = like.cond.nbytes * records + sum(values[0].nbytes for values in per_draw) * rows
    if needed > most_bytes:
        raise Damaged(
            f"record {like.key}: {rows} rows like its own would take {needed:,} bytes, all shards have {most_bytes:,}"
            " - run sollune shards verify on its cache"
        )
