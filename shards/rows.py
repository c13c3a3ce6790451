"""Sources of rows for training: a split held in memory, or read state by state from its shards.

Each has `gather(records, state_indices)`: row i is state `state_indices[i]` of record number `records[i]`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from configs.values import PictureSize
from shards.archive import RecordSpan, Shard
from shards.batch import Batch, Labels, batch_of, row_names
from shards.integrity import Damaged
from shards.opened import OpenShards
from shards.record import NOT_PER_STATE, Record, RecordLayout, tensors_of
from shards.stream.order import Indices

MAX_CACHED_HEADERS = 1 << 16
"""Records whose texts and layouts stay in memory: some 50 MB."""
MAX_GAP_BYTES = 16 << 10
"""To read over this much costs less than a second read."""
DISCARD_BUFFER = memoryview(bytearray(MAX_GAP_BYTES))


MAX_WAITING_READS = 64
"""Reads of one batch that the disk does at once: more of them are no faster, and keep the first one waiting."""


class Read(NamedTuple):
    """Bytes of a shard and where they go; the buffers hold `size` bytes together."""

    shard: Shard
    offset: int
    buffers: list[memoryview]
    size: int


class StreamedRows:
    """Each state is read from its shard straight into its row of the batch; only headers are kept in memory."""

    def __init__(
        self,
        shards: OpenShards,
        locate: Callable[[int], tuple[Shard, RecordSpan]],
        pinned: bool,
        landings: bool = False,
        x0: bool = False,
    ) -> None:
        """`locate` says where record number n lies; `pinned` rows can be copied to a GPU while it computes."""
        self._shards, self._locate, self._pinned = shards, locate, pinned
        self._landings, self._x0 = landings, x0
        self._header = lru_cache(maxsize=MAX_CACHED_HEADERS)(lambda number: shards.header(*locate(number)))

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """Row i is state `state_indices[i]` of record number `records[i]`."""
        headers = [self._header(number) for number in records.tolist()]
        indices = state_indices.tolist()
        # Those left out are in headers.
        wanted = row_names(headers[0].blocks, self._landings, self._x0, headers[0].layout.tensors)
        names = tuple(name for name in wanted if name not in ("s", "k"))
        tensors, bytes_of = {}, {}
        for name in names:
            _, shape, dtype, _ = headers[0].layout.tensors[name]
            tensors[name] = torch.empty(len(headers), *shape, dtype=dtype, pin_memory=self._pinned)
            bytes_of[name] = memoryview(tensors[name].view(torch.uint8).numpy().data).cast("B")
        # What the system holds is copied at once; the disk fetches the rest, many pieces at a time, as they are needed.
        waiting: deque[Read] = deque()
        for row, (number, header, index) in enumerate(zip(records.tolist(), headers, indices, strict=True)):
            shard, span = self._locate(number)
            for first, size, pieces in plan_reads(header.layout, names, index):
                buffers = [
                    bytes_of[name][row * length : (row + 1) * length] if name else DISCARD_BUFFER[:length]
                    for name, length in pieces
                ]
                read = Read(shard, span.st_offset + first, buffers, size)
                if self._shards.read_cached(*read):
                    continue
                self._shards.fetch(shard, read.offset, size)
                waiting.append(read)
                if len(waiting) > MAX_WAITING_READS:
                    self._shards.read_into(*waiting.popleft())
        for read in waiting:
            self._shards.read_into(*read)
        rows = list(zip(headers, indices, strict=True))
        tensors["s"] = torch.tensor([header.s[index] for header, index in rows], dtype=torch.float32)
        tensors["k"] = torch.tensor([header.k[index] for header, index in rows], dtype=torch.int64)
        return batch_of(headers, tensors, torch.from_numpy(state_indices), headers[0].size)


@lru_cache(maxsize=1024)
def plan_reads(
    layout: RecordLayout, names: tuple[str, ...], state_index: int
) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """(first byte, bytes, pieces) of every read that one state takes; a piece without a name fills a small gap."""
    spans = []
    for name in names:
        offset, _, _, row_bytes = layout.tensors[name]
        spans.append((offset + (0 if name in NOT_PER_STATE else state_index * row_bytes), row_bytes, name))
    reads: list[tuple[int, int, list[tuple[str, int]]]] = []
    for first, size, name in sorted(spans):
        start, length, pieces = reads[-1] if reads else (0, 0, [])
        gap = first - start - length
        if reads and 0 <= gap <= MAX_GAP_BYTES:
            pieces += [("", gap), (name, size)] if gap else [(name, size)]
            reads[-1] = (start, length + gap + size, pieces)
        else:
            reads.append((first, size, [(name, size)]))
    return reads


class InMemoryRows:
    """The records of one size of a split in memory, one tensor for each field, so that a batch is a selection."""

    def __init__(
        self,
        records: Iterable[Record],
        starts: Indices,
        pinned: bool,
        max_bytes: int,
        first: int = 0,
        landings: bool = False,
        x0: bool = False,
    ) -> None:
        """`starts` is the first row of each record, and after the last one the number of all rows.

        `first` is the number of the first of these records in the split.
        Raises `Damaged` when the first record is so large that as many of them would not fit into `max_bytes`, which
        the shards take.
        """
        self._starts, self._pinned, self._first = torch.from_numpy(starts), pinned, first
        self._landings, self._x0 = landings, x0
        self._size: PictureSize | None = None
        self._labels: list[Labels] = []
        self._columns: dict[str, Tensor] = {}
        for number, record in enumerate(records):
            tensors = tensors_of(record)
            if number == 0:
                self._size = record.size
                self._allocate(record, len(starts) - 1, int(starts[-1]), max_bytes)
            self._labels.append(Labels(record.key, record.text, record.class_name, record.guidance_scale))
            rows = slice(int(starts[number]), int(starts[number + 1]))
            for name, column in self._columns.items():
                column[number if name in NOT_PER_STATE else rows] = tensors[name]

    def _allocate(self, example: Record, records: int, rows: int, max_bytes: int) -> None:
        tensors, needed = tensors_of(example), 0
        shapes = dict[str, tuple[int, ...]]()
        for name in row_names(example.features.by_block, self._landings, self._x0, tensors):
            shape = tensors[name].shape
            shapes[name] = (records, *shape) if name in NOT_PER_STATE else (rows, *shape[1:])
            needed += math.prod(shapes[name]) * tensors[name].itemsize
        if needed > max_bytes:
            raise Damaged(
                f"record {example.key}: {rows} rows like its own would take {needed:,} bytes, all shards have "
                f"{max_bytes:,} - run sollune shards verify on its cache"
            )
        self._columns = {name: torch.empty(shape, dtype=tensors[name].dtype) for name, shape in shapes.items()}

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """Row i is state `state_indices[i]` of record number `records[i]`."""
        records = records - self._first
        numbers, indices = torch.from_numpy(records), torch.from_numpy(state_indices)
        rows = self._starts[numbers] + indices
        tensors = {}
        for name, column in self._columns.items():
            selection = numbers if name in NOT_PER_STATE else rows
            out = torch.empty(len(rows), *column.shape[1:], dtype=column.dtype, pin_memory=self._pinned)
            tensors[name] = torch.index_select(column, 0, selection, out=out)
        return batch_of([self._labels[number] for number in records.tolist()], tensors, indices, self._size)
