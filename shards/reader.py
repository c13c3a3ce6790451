"""Shards -> records -> batches, in an order that is a function of the sample's number."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int

from configs.refusal import Refused
from shards.archive import Place
from shards.batch import Batch
from shards.columns import Columns, Rows, Slices
from shards.entries import Shard
from shards.layout import Head
from shards.manifest import Manifest, find_cache, refusal, way_out
from shards.opened import OpenShards
from shards.order import Order, Pairs, ShuffledOrder, WeightedOrder
from shards.prefetch import ahead
from shards.record import Record, Split
from shards.view import View

Indices = Int[np.ndarray, " n"]

TWO_GIB = 2 << 30
MOST_WORKERS = 4


class Reader:
    """One split of a cache as an endless stream of samples, a sample being one draw of one record.

    The stream has no other state than the number of the next sample: rank r of `world` takes the samples n with
    n mod world = r, so a run goes on at any number with any world size, and no batch is ever short. How many threads
    read ahead changes nothing but the time.
    """

    def __init__(
        self,
        folder: Path,
        split: Split = "train",
        seed: int = 0,
        batch_size: int = 32,
        *,
        view: View | None = None,
        keys: Collection[str] | None = None,
        class_weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        memory_budget_bytes: int = TWO_GIB,
    ) -> None:
        """`folder` is a cache or a run folder; `batch_size` counts the rows of one rank.

        Only the samples of `view` are in the stream, and with `keys` only those of these records. With `class_weights`
        it draws classes by weight (`WeightedOrder`), else it shuffles all samples anew in each epoch (`ShuffledOrder`).
        A split of up to `memory_budget_bytes` is held in memory. `workers` threads read ahead, 0 for none; unless told,
        as many as the processors make useful.
        Raises `Refused` when a shard is missing or cut; its content is checked when it is first read.
        """
        if not 0 <= rank < world or batch_size < 1 or (workers or 0) < 0:
            raise ValueError(f"rank {rank} of {world}, batch_size {batch_size}, workers {workers}")
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
        self.view, self._keys, self._weights = view or View(), keys, class_weights
        self._in_memory = sum(shard.bytes for shard in self.shards) <= memory_budget_bytes
        useful = 0 if self._in_memory else min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self.workers = useful if workers is None else workers
        self._first = np.cumsum([0, *(shard.records for shard in self.shards)])

    @cached_property
    def pairs(self) -> Pairs:
        """The (record, draw) pairs of the view; raises `Refused` when there is none."""
        records = [shard.records for shard in self.shards]
        draws = np.repeat([shard.draws_per_record for shard in self.shards], records)
        pairs = Pairs(draws, records, self._wanted())
        if not len(pairs):
            raise Refused(f"{self.folder}: no sample of split {self.split} is in the view {self.view!r} - widen it")
        return pairs

    def _wanted(self) -> Bool[np.ndarray, " n"] | None:
        """For each pair of the split whether it is in the stream; None where all are."""
        if self.view.takes_all() and self._keys is None:
            return None
        heads = list(self._heads(self.split))
        wanted = self.view.wanted(heads)
        if self._keys is None:
            return wanted
        chosen = set(self._keys)
        told: Bool[np.ndarray, " n"] = np.repeat(
            [head.key in chosen for head in heads], [len(head.s) for head in heads]
        )
        both: Bool[np.ndarray, " n"] = wanted & told
        return both

    @property
    def samples_per_epoch(self) -> int:
        """Number of (record, draw) pairs in the view of the split."""
        return len(self.pairs)

    @cached_property
    def order(self) -> Order:
        """Which sample is which draw of which record."""
        if self._weights is None:
            return ShuffledOrder(self.seed, self.pairs)
        return WeightedOrder(self.seed, self.pairs, self.class_names(), self._weights)

    @cached_property
    def steps(self) -> Indices:
        """The teacher's step k of each pair of the view."""
        k = np.concatenate([record.k for record in self._heads(self.split)])
        return k if self.pairs.chosen is None else k[self.pairs.chosen]

    def batches(self, start_sample: int = 0, order: Order | None = None) -> Iterator[Batch]:
        """Endless batches of this rank's samples from number `start_sample` (counted over all ranks) on.

        Another `order` of this reader's pairs may take the place of its own.
        """
        first = start_sample + (self.rank - start_sample) % self.world
        step = self.batch_size * self.world
        return self.read((np.arange(begin, begin + step, self.world) for begin in count(first, step)), order)

    def read(self, places: Iterable[Indices], order: Order | None = None) -> Iterator[Batch]:
        """For each set of places of the stream the rows there, in this order, read ahead."""
        order, rows = order or self.order, self._rows  # made here once, not by several threads at a time
        return ahead(lambda samples: rows.take(*order.at(samples)), places, self.workers)

    def batch(self, samples: Indices) -> Batch:
        """The rows at these places of the stream."""
        return self._rows.take(*self.order.at(samples))

    def class_names(self, split: Split | None = None) -> list[str]:
        """The class of each record of a split (this reader's own, unless told), in the order of its shards."""
        return [record.class_name for record in self._heads(split or self.split)]

    def heads(self) -> Iterator[Head]:
        """Every record of the split without its large tensors, in the order of its shards."""
        return self._heads(self.split)

    def records(self, split: Split | None = None) -> Iterator[Record]:
        """Every record of a split (this reader's own, unless told), in the order of its shards."""
        for shard in self.manifest.of(split or self.split):
            for place in shard.offsets:
                yield self._open.record(shard, place)

    def record(self, key: str, split: Split | None = None) -> Record:
        """The record with this key in a split (this reader's own, unless told)."""
        shards = self.manifest.of(split or self.split)
        for shard in shards:
            if shard.first_key <= key <= shard.last_key:
                for place in shard.offsets:
                    if self._open.head(shard, place).key == key:
                        return self._open.record(shard, place)
        known = f"{shards[0].first_key} to {shards[-1].last_key}" if shards else "none"
        raise Refused(f"{self.folder}: no record {key} in split {split or self.split} - keys are {known}")

    def number(self, number: int) -> Record:
        """The record at a place of the split, from 0."""
        return self._open.record(*self._locate(number))

    def _locate(self, number: int) -> tuple[Shard, Place]:
        at = int(np.searchsorted(self._first, number, side="right")) - 1
        shard = self.shards[at]
        return shard, shard.offsets[number - int(self._first[at])]

    def _heads(self, split: Split) -> Iterator[Head]:
        """Every record of a split without its large tensors; shards are checked several at a time."""

        def listed(shard: Shard) -> list[Head]:
            return [self._open.head(shard, place) for place in shard.offsets]

        with ThreadPoolExecutor(MOST_WORKERS) as pool:
            yield from chain.from_iterable(pool.map(listed, self.manifest.of(split)))

    @cached_property
    def _rows(self) -> Rows:
        pinned = torch.cuda.is_available()
        if not self._in_memory:
            return Slices(self._open, self._locate, pinned)
        return Columns(self.records(), self.pairs.starts, pinned, sum(shard.bytes for shard in self.shards))
