"""Rows for training: one draw of one record each.

Where rows come from: a split held in memory column by column, or draws read one by one as they are asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.archive import RecordSpan, Shard
from shards.integrity import Damaged
from shards.opened import OpenShards
from shards.record import FEATURES, PER_PROMPT, Record, RecordHeader, RecordLayout, TensorLayout


@dataclass(frozen=True)
class Batch:
    """b rows; `draw` is the row's place among the draws of its record."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    class_names: tuple[str, ...]
    cond: Float[Tensor, "b L d"]
    x_t: Float[Tensor, "b c h w"]
    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    s: Float[Tensor, " b"]
    k: Int[Tensor, " b"]
    features: Mapping[str, Float[Tensor, "b n_b"]]
    state_index: Int[Tensor, " b"]
    own_guidance: Float[Tensor, " b"] | None = None
    """float32; where `v_cond` is the picture's own velocity, the guidance scale under which it is meant to be met, at
    least 1; 0 where the teacher answered; None where he always did"""
    group: Int[Tensor, " b"] | None = None
    """which of some groups each row is told with in the journal; None where they are not told apart"""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, selection: slice) -> "Batch":
        """Some of the rows."""
        told = {name: values for name, values in vars(self).items() if name != "features" and values is not None}
        return replace(
            self,
            **{name: values[selection] for name, values in told.items()},
            features={block: values[selection] for block, values in self.features.items()},
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """The same rows elsewhere; s stays float32, because a time does not survive half precision."""

        def moved(values: Tensor) -> Tensor:
            # As stored, and cast over there: a cast here would leave pinned memory and double the bytes on the way.
            return values.to(device, non_blocking=True).to(dtype)

        def placed(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device, non_blocking=True)

        return replace(
            self,
            cond=moved(self.cond),
            x_t=moved(self.x_t),
            v_cond=moved(self.v_cond),
            v_uncond=moved(self.v_uncond),
            s=self.s.to(device, non_blocking=True),
            k=self.k.to(device, non_blocking=True),
            features={block: moved(values) for block, values in self.features.items()},
            state_index=self.state_index.to(device, non_blocking=True),
            own_guidance=placed(self.own_guidance),
            group=placed(self.group),
        )


def collate(records: Sequence[Record], state_indices: Sequence[int]) -> Batch:
    """Row i is draw `draws[i]` of `records[i]`."""
    rows = list(zip(records, state_indices, strict=True))
    return Batch(
        keys=tuple(record.key for record in records),
        texts=tuple(record.text for record in records),
        class_names=tuple(record.class_name for record in records),
        cond=torch.stack([record.cond for record in records]),
        x_t=torch.stack([record.states.x_t[i] for record, i in rows]),
        v_cond=torch.stack([record.states.v_cond[i] for record, i in rows]),
        v_uncond=torch.stack([record.states.v_uncond[i] for record, i in rows]),
        s=torch.stack([record.states.s[i] for record, i in rows]),
        k=torch.stack([record.states.k[i] for record, i in rows]),
        features={
            block: torch.stack([record.features.by_block[block][i] for record, i in rows])
            for block in records[0].features.by_block
        },
        state_index=torch.tensor(list(state_indices), dtype=torch.int64),
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one after the other; they must have the same blocks, and groups all or none of them."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    own = [torch.zeros(len(batch)) if batch.own_guidance is None else batch.own_guidance for batch in batches]
    return Batch(
        keys=tuple(key for batch in batches for key in batch.keys),
        texts=tuple(text for batch in batches for text in batch.texts),
        class_names=tuple(name for batch in batches for name in batch.class_names),
        cond=joined("cond"),
        x_t=joined("x_t"),
        v_cond=joined("v_cond"),
        v_uncond=joined("v_uncond"),
        s=joined("s"),
        k=joined("k"),
        features={block: torch.cat([batch.features[block] for batch in batches]) for block in batches[0].features},
        state_index=joined("state_index"),
        own_guidance=None if all(batch.own_guidance is None for batch in batches) else torch.cat(own),
        group=None if batches[0].group is None else joined("group"),
    )


Indices = Int[np.ndarray, " n"]

MAX_CACHED_HEADERS = 1 << 16
"""Records whose words and places stay in memory: some 50 MB."""
MAX_GAP_BYTES = 16 << 10
"""To read over this much costs less than to ask for a second read."""
DISCARD_BUFFER = memoryview(bytearray(MAX_GAP_BYTES))
"""Where gaps are read to; nobody looks."""


class RowSource(Protocol):
    """Something that can hand over any draws of any records of a split."""

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        ...


class StreamedRows:
    """Draws read when they are asked for, each straight from its shard into its row of the batch.

    Nothing is decoded or kept: what was read lately lies in the memory of the operating system.
    """

    def __init__(self, shards: OpenShards, locate: Callable[[int], tuple[Shard, RecordSpan]], pinned: bool) -> None:
        """`locate` says where record number n lies; `pinned` rows can be copied to a GPU while it computes."""
        self._shards, self._locate, self._pinned = shards, locate, pinned
        self._header = lru_cache(maxsize=MAX_CACHED_HEADERS)(self._read_header)

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        heads = [self._header(number) for number in records.tolist()]
        listed = state_indices.tolist()
        names = large_tensor_names(heads[0].blocks)
        parts = heads[0].layout.tensors
        room = {name: self._allocate(len(heads), parts[name]) for name in names}
        bytes_of = {name: memoryview(values.view(torch.uint8).numpy().data).cast("B") for name, values in room.items()}
        for row, (number, head, draw) in enumerate(zip(records.tolist(), heads, listed, strict=True)):
            shard, place = self._locate(number)
            for first, size, pieces in plan_reads(head.layout, names, draw):
                buffers = [
                    bytes_of[name][row * length : (row + 1) * length] if name else DISCARD_BUFFER[:length]
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
            state_index=torch.from_numpy(state_indices),
        )

    def _allocate(self, rows: int, part: TensorLayout) -> Tensor:
        return torch.empty(rows, *part.shape, dtype=part.dtype, pin_memory=self._pinned)

    def _read_header(self, number: int) -> RecordHeader:
        return self._shards.header(*self._locate(number))


def large_tensor_names(blocks: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors of a row that are read for it alone."""
    return ("cond", "x_t", "v_cond", "v_uncond", *(f"{FEATURES}{block}" for block in blocks))


@lru_cache(maxsize=1024)
def plan_reads(
    layout: RecordLayout, names: tuple[str, ...], state_index: int
) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """(first byte, bytes, pieces) of every read that one draw takes; a piece without a name fills a small gap."""
    spans = []
    for name in names:
        part = layout.tensors[name]
        first = part.offset + (0 if name in PER_PROMPT else state_index * part.row_bytes)
        spans.append((first, part.row_bytes, name))
    found: list[tuple[int, int, list[tuple[str, int]]]] = []
    for first, size, name in sorted(spans):
        start, length, pieces = found[-1] if found else (0, 0, [])
        gap = first - start - length
        if found and 0 <= gap <= MAX_GAP_BYTES:
            pieces += [("", gap), (name, size)] if gap else [(name, size)]
            found[-1] = (start, length + gap + size, pieces)
        else:
            found.append((first, size, [(name, size)]))
    return found


class InMemoryRows:
    """A whole split in memory, one tensor for each field, so that a batch is a selection."""

    def __init__(self, records: Iterable[Record], starts: Indices, pinned: bool, max_bytes: int) -> None:
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
                _refuse_outsized(record, len(starts) - 1, int(starts[-1]), max_bytes)
                self._allocate(record, len(starts) - 1, int(starts[-1]))
            self._store(number, record, slice(int(starts[number]), int(starts[number + 1])))

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """Row i is draw `draws[i]` of record number `records[i]`."""
        numbers, draw = torch.from_numpy(records), torch.from_numpy(state_indices)
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
            state_index=draw,
        )

    def _select(self, values: Tensor, rows: Tensor) -> Tensor:
        """These rows, in memory that a GPU can copy from while it computes, where there is one."""
        room = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=self._pinned)
        return torch.index_select(values, 0, rows, out=room)

    def _allocate(self, example: Record, records: int, rows: int) -> None:
        def room(values: Tensor) -> Tensor:
            return torch.empty(rows, *values.shape[1:], dtype=values.dtype)

        draws = example.states
        self._cond = torch.empty(records, *example.cond.shape, dtype=example.cond.dtype)
        self._x_t, self._v_cond, self._v_uncond = room(draws.x_t), room(draws.v_cond), room(draws.v_uncond)
        self._s, self._k = room(draws.s), room(draws.k)
        self._features = {block: room(values) for block, values in example.features.by_block.items()}

    def _store(self, number: int, record: Record, rows: slice) -> None:
        self._keys.append(record.key)
        self._texts.append(record.text)
        self._class_names.append(record.class_name)
        self._cond[number] = record.cond
        self._x_t[rows], self._v_cond[rows], self._v_uncond[rows] = (
            record.states.x_t,
            record.states.v_cond,
            record.states.v_uncond,
        )
        self._s[rows], self._k[rows] = record.states.s, record.states.k
        for block, values in record.features.by_block.items():
            self._features[block][rows] = values


def _refuse_outsized(example: Record, records: int, rows: int, max_bytes: int) -> None:
    draws = example.states
    per_draw = [draws.x_t, draws.v_cond, draws.v_uncond, draws.s, draws.k, *example.features.by_block.values()]
    needed = example.cond.nbytes * records + sum(values[0].nbytes for values in per_draw) * rows
    if needed > max_bytes:
        raise Damaged(
            f"record {example.key}: {rows} rows like its own would take {needed:,} bytes, all shards have {max_bytes:,}"
            " - run sollune shards verify on its cache"
        )
