"""Rows for training, one state of one record each, from a split held in memory or read state by state from its shards.

A source of rows has `gather(records, state_indices)`: row i is state `state_indices[i]` of record number `records[i]`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.values import PictureSize
from shards.archive import RecordSpan, Shard
from shards.integrity import Damaged
from shards.opened import OpenShards
from shards.record import (
    FEATURES,
    LATENTS,
    PER_PROMPT,
    ROW_FIELDS,
    STATE_FIELDS,
    Record,
    RecordHeader,
    RecordLayout,
    tensors_of,
)
from shards.stream.order import Indices

Item = TypeVar("Item")
Result = TypeVar("Result")
PREFETCH_PER_WORKER = 2
LATENT_FIELDS = tuple(STATE_FIELDS[name] for name in LATENTS)


@dataclass(frozen=True)
class Batch:
    """b rows of pictures of one size; `state_index` is the row's place among the states of its record."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    class_names: tuple[str, ...]
    cond: Float[Tensor, "b L d"]
    x_s: Float[Tensor, "b c h w"]
    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    s: Float[Tensor, " b"]
    k: Int[Tensor, " b"]
    features: Mapping[str, Float[Tensor, "b n_b"]]
    state_index: Int[Tensor, " b"]
    own_guidance: Float[Tensor, " b"] | None = None
    """float32; where `v_cond` is the picture's own velocity, the guidance scale under which it is the target, at least
    1; 0 where `v_cond` is the teacher's; None where all are"""
    group: Int[Tensor, " b"] | None = None
    """the group under which the journal reports each row; None where it reports all rows together"""
    size: PictureSize | None = None
    """of the pictures, in pixels; None where the cache does not tell it"""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, selection: slice) -> "Batch":
        """Some of the rows."""
        return self._map(lambda _, values: values[selection])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """The same rows on a device; s stays float32, because a time does not survive half precision."""

        def moved(name: str, values: Any) -> Any:
            if not isinstance(values, Tensor):
                return values
            # As stored, and cast over there: a cast here would leave pinned memory and double the bytes on the way.
            there = values.to(device, non_blocking=True)
            return there.to(dtype) if name in ("cond", "features", *LATENT_FIELDS) else there

        return self._map(moved)

    def _map(self, change: Callable[[str, Any], Any]) -> "Batch":
        """A batch of `change(name, values)` for each field that is not None, and for the features of each block."""
        whole = ("features", "size")  # not a value for each row
        present = {name: values for name, values in vars(self).items() if name not in whole and values is not None}
        return replace(
            self,
            **{name: change(name, values) for name, values in present.items()},
            features={block: change("features", values) for block, values in self.features.items()},
        )


def collate(records: Sequence[Record], state_indices: Sequence[int]) -> Batch:
    """Row i is state `state_indices[i]` of `records[i]`, which have pictures of one size."""
    rows = list(zip([tensors_of(record) for record in records], state_indices, strict=True))
    return _batch(
        records,
        {
            name: torch.stack([tensors[name] if name in PER_PROMPT else tensors[name][i] for tensors, i in rows])
            for name in _row_names(records[0].features.by_block)
        },
        torch.tensor(list(state_indices), dtype=torch.int64),
        records[0].size,
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one after the other; they must have the same size and blocks, and all groups or none.

    Raises `ValueError` for batches of different sizes.
    """
    if len(sizes := {batch.size for batch in batches}) > 1:
        raise ValueError(f"batches of {len(sizes)} sizes: {', '.join(map(str, sizes))}")

    def joined(values: list[Any]) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else tuple(chain.from_iterable(values))

    names = {field.name for field in fields(Batch)} - {"features", "own_guidance", "group", "size"}
    own = [torch.zeros(len(batch)) if batch.own_guidance is None else batch.own_guidance for batch in batches]
    return Batch(
        **{name: joined([getattr(batch, name) for batch in batches]) for name in names},
        features={block: joined([batch.features[block] for batch in batches]) for block in batches[0].features},
        own_guidance=None if all(batch.own_guidance is None for batch in batches) else joined(own),
        group=None if batches[0].group is None else joined([batch.group for batch in batches]),
        size=batches[0].size,
    )


MAX_CACHED_HEADERS = 1 << 16
"""Records whose texts and layouts stay in memory: some 50 MB."""
MAX_GAP_BYTES = 16 << 10
"""To read over this much costs less than a second read."""
DISCARD_BUFFER = memoryview(bytearray(MAX_GAP_BYTES))


class StreamedRows:
    """Each state is read from its shard straight into its row of the batch; only headers are kept in memory."""

    def __init__(self, shards: OpenShards, locate: Callable[[int], tuple[Shard, RecordSpan]], pinned: bool) -> None:
        """`locate` says where record number n lies; `pinned` rows can be copied to a GPU while it computes."""
        self._shards, self._locate, self._pinned = shards, locate, pinned
        self._header = lru_cache(maxsize=MAX_CACHED_HEADERS)(lambda number: shards.header(*locate(number)))

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """Row i is state `state_indices[i]` of record number `records[i]`."""
        headers = [self._header(number) for number in records.tolist()]
        indices = state_indices.tolist()
        names = tuple(name for name in _row_names(headers[0].blocks) if name not in ("s", "k"))  # those are in headers
        tensors, bytes_of = {}, {}
        for name in names:
            _, shape, dtype, _ = headers[0].layout.tensors[name]
            tensors[name] = torch.empty(len(headers), *shape, dtype=dtype, pin_memory=self._pinned)
            bytes_of[name] = memoryview(tensors[name].view(torch.uint8).numpy().data).cast("B")
        for row, (number, header, index) in enumerate(zip(records.tolist(), headers, indices, strict=True)):
            shard, span = self._locate(number)
            for first, size, pieces in plan_reads(header.layout, names, index):
                buffers = [
                    bytes_of[name][row * length : (row + 1) * length] if name else DISCARD_BUFFER[:length]
                    for name, length in pieces
                ]
                self._shards.read_into(shard, span.st_offset + first, buffers, size)
        rows = list(zip(headers, indices, strict=True))
        tensors["s"] = torch.tensor([header.s[index] for header, index in rows], dtype=torch.float32)
        tensors["k"] = torch.tensor([header.k[index] for header, index in rows], dtype=torch.int64)
        return _batch(headers, tensors, torch.from_numpy(state_indices), headers[0].size)


@lru_cache(maxsize=1024)
def plan_reads(
    layout: RecordLayout, names: tuple[str, ...], state_index: int
) -> list[tuple[int, int, list[tuple[str, int]]]]:
    """(first byte, bytes, pieces) of every read that one state takes; a piece without a name fills a small gap."""
    spans = []
    for name in names:
        offset, _, _, row_bytes = layout.tensors[name]
        spans.append((offset + (0 if name in PER_PROMPT else state_index * row_bytes), row_bytes, name))
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


class Labels(NamedTuple):
    """The texts of a record."""

    key: str
    text: str
    class_name: str


class InMemoryRows:
    """The records of one size of a split in memory, one tensor for each field, so that a batch is a selection."""

    def __init__(
        self, records: Iterable[Record], starts: Indices, pinned: bool, max_bytes: int, first: int = 0
    ) -> None:
        """`starts` is the first row of each record, and after the last one the number of all rows.

        `first` is the number of the first of these records in the split.
        Raises `Damaged` when the first record is so large that as many of them would not fit into `max_bytes`, which
        the shards take.
        """
        self._starts, self._pinned, self._first = torch.from_numpy(starts), pinned, first
        self._size: PictureSize | None = None
        self._labels: list[Labels] = []
        self._columns: dict[str, Tensor] = {}
        for number, record in enumerate(records):
            tensors = tensors_of(record)
            if number == 0:
                self._size = record.size
                self._allocate(record, len(starts) - 1, int(starts[-1]), max_bytes)
            self._labels.append(Labels(record.key, record.text, record.class_name))
            rows = slice(int(starts[number]), int(starts[number + 1]))
            for name, column in self._columns.items():
                column[number if name in PER_PROMPT else rows] = tensors[name]

    def _allocate(self, example: Record, records: int, rows: int, max_bytes: int) -> None:
        tensors, needed = tensors_of(example), 0
        shapes = dict[str, tuple[int, ...]]()
        for name in _row_names(example.features.by_block):
            shape = tensors[name].shape
            shapes[name] = (records, *shape) if name in PER_PROMPT else (rows, *shape[1:])
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
            selection = numbers if name in PER_PROMPT else rows
            out = torch.empty(len(rows), *column.shape[1:], dtype=column.dtype, pin_memory=self._pinned)
            tensors[name] = torch.index_select(column, 0, selection, out=out)
        return _batch([self._labels[number] for number in records.tolist()], tensors, indices, self._size)


def _row_names(blocks: Iterable[str]) -> tuple[str, ...]:
    """The stored tensors that a row of a batch has."""
    return ("cond", *ROW_FIELDS, *(f"{FEATURES}{block}" for block in blocks))


def _batch(
    records: Sequence[Record | RecordHeader | Labels],
    tensors: Mapping[str, Tensor],
    state_index: Int[Tensor, " b"],
    size: PictureSize | None,
) -> Batch:
    """The batch of these records, of the tensors that `_row_names` lists."""
    return Batch(
        keys=tuple(record.key for record in records),
        texts=tuple(record.text for record in records),
        class_names=tuple(record.class_name for record in records),
        cond=tensors["cond"],
        **{STATE_FIELDS[name]: tensors[name] for name in ROW_FIELDS},
        features={name.removeprefix(FEATURES): tensors[name] for name in tensors if name.startswith(FEATURES)},
        state_index=state_index,
        size=size,
    )


def map_ahead(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`make` of each item, in order; an error is raised where its result would have come.

    Up to two results for each worker wait to be fetched; without workers each is made when it is needed.
    """
    if workers == 0:
        yield from map(make, items)
        return
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    try:
        while True:
            while len(waiting) < PREFETCH_PER_WORKER * workers:
                try:
                    waiting.append(pool.submit(make, next(remaining)))
                except StopIteration:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
