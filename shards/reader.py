"""Shards -> records -> batches, in an order that is a function of the sample's number."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from configs.refusal import Refused
from shards.archive import Place
from shards.batch import Batch
from shards.codec import decode, head
from shards.columns import Columns, ReadRows, Rows
from shards.manifest import Manifest, Shard, find_cache, refusal, way_out
from shards.order import Order, Pairs, UniformOrder, WeightedOrder
from shards.record import Record, Split

Indices = Int[np.ndarray, " n"]

MOST_OPEN = 64
TWO_GIB = 2 << 30


class Reader:
    """One split of a cache as an endless stream of samples, a sample being one draw of one record.

    The stream has no other state than the number of the next sample: rank r of `world` takes the samples n with
    n mod world = r, so a run goes on at any number with any world size, and no batch is ever short.
    """

    def __init__(
        self,
        folder: Path,
        split: Split = "train",
        seed: int = 0,
        batch_size: int = 32,
        *,
        class_weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
        memory_budget_bytes: int = TWO_GIB,
    ) -> None:
        """`folder` is a cache or a run folder; `batch_size` counts the rows of one rank.

        With `class_weights` the stream draws classes by weight (`WeightedOrder`), else it permutes all samples anew in
        each epoch. Up to `memory_budget_bytes` of decoded records stay in memory. Raises `Refused` when a shard is
        missing or cut; its content is checked when it is first read.
        """
        if not 0 <= rank < world or batch_size < 1:
            raise ValueError(f"rank {rank} of {world}, batch_size {batch_size}")
        self.folder = find_cache(folder)
        self.manifest = Manifest.open(self.folder)
        self.split, self.seed, self.batch_size, self.rank, self.world = split, seed, batch_size, rank, world
        self.shards = self.manifest.of(split)
        if not self.shards:
            raise Refused(f"{self.folder}: holds no record of split {split} - {way_out(self.folder)}")
        for shard in self.shards:
            fault = shard.fault_at_a_glance(self.folder)
            if fault:
                raise Refused(refusal(self.folder, shard, fault))
        self._open = OpenShards(self.folder)
        self._budget, self._weights = memory_budget_bytes, class_weights
        self._first = np.cumsum([0, *(shard.records for shard in self.shards)])
        self.pairs = Pairs(np.repeat([s.draws_per_record for s in self.shards], [s.records for s in self.shards]))

    @property
    def samples_per_epoch(self) -> int:
        """Number of (record, draw) pairs in the split."""
        return len(self.pairs)

    @property
    def records_in_split(self) -> int:
        """Number of records in the split."""
        return int(self._first[-1])

    @cached_property
    def order(self) -> Order:
        """Which sample is which draw of which record."""
        if self._weights is None:
            return UniformOrder(self.seed, self.pairs)
        return WeightedOrder(self.seed, self.pairs, self.class_names(), self._weights)

    def batches(self, start_sample: int = 0) -> Iterator[Batch]:
        """Endless batches of this rank's samples from number `start_sample` (counted over all ranks) on."""
        first = start_sample + (self.rank - start_sample) % self.world
        step = self.batch_size * self.world
        while True:
            yield self.batch(np.arange(first, first + step, self.world))
            first += step

    def batch(self, samples: Indices) -> Batch:
        """The rows at these places of the stream."""
        return self._rows.take(*self.order.at(samples))

    def class_names(self, split: Split | None = None) -> list[str]:
        """The class of each record of a split (this reader's own, unless told), in the order of its shards."""
        places = [(shard, place) for shard in self.manifest.of(split or self.split) for place in shard.offsets]
        return [str(head(self._open.read(shard, place)[0])["class_name"]) for shard, place in places]

    def records(self, split: Split | None = None) -> Iterator[Record]:
        """Every record of a split (this reader's own, unless told), in the order of its shards."""
        for shard in self.manifest.of(split or self.split):
            for place in shard.offsets:
                yield decode(*self._open.read(shard, place))

    def record(self, key: str, split: Split | None = None) -> Record:
        """The record with this key in a split (this reader's own, unless told)."""
        shards = self.manifest.of(split or self.split)
        for shard in shards:
            if shard.first_key <= key <= shard.last_key:
                for place in shard.offsets:
                    json_bytes, st_bytes = self._open.read(shard, place)
                    if head(json_bytes)["key"] == key:
                        return decode(json_bytes, st_bytes)
        known = f"{shards[0].first_key} to {shards[-1].last_key}" if shards else "none"
        raise Refused(f"{self.folder}: no record {key} in split {split or self.split} - keys are {known}")

    def number(self, number: int) -> Record:
        """The record at a place of the split, from 0."""
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        shard = self.shards[at]
        return decode(*self._open.read(shard, shard.offsets[number - int(self._first[at])]))

    @cached_property
    def _rows(self) -> Rows:
        size = sum(shard.bytes for shard in self.shards)
        if size <= self._budget:
            return Columns(self.records(), self.pairs.starts)
        return ReadRows(self.number, most=self._budget * self.records_in_split // size)


class OpenShards:
    """Tars open for reading by offset, the latest few; each is checked against its sha256 when it is first opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._checked: set[str] = set()
        weakref.finalize(self, _close, self._handles)

    def read(self, shard: Shard, place: Place) -> tuple[bytes, bytes]:
        """The two members of a record, in one read."""
        first = place.json_offset
        content = os.pread(self._handle(shard), place.st_offset + place.st_size - first, first)
        return content[: place.json_size], content[place.st_offset - first :]

    def _handle(self, shard: Shard) -> int:
        if shard.file not in self._handles:
            self._check(shard)
            if len(self._handles) >= MOST_OPEN:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[shard.file] = os.open(self.folder / shard.file, os.O_RDONLY)
        self._handles.move_to_end(shard.file)
        return self._handles[shard.file]

    def _check(self, shard: Shard) -> None:
        fault = None if shard.file in self._checked else shard.fault(self.folder)
        if fault:
            raise Refused(refusal(self.folder, shard, fault))
        self._checked.add(shard.file)


def _close(handles: "OrderedDict[str, int]") -> None:
    for handle in handles.values():
        os.close(handle)
