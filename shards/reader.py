"""Batches made ahead of their use, in threads, and handed over in order.

A part of a split, chosen by its reader: the shards stay as they are.

Shards -> records -> batches, in an order that is a function of the sample's number.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator

from configs.values import Strict
from shards.archive import RecordSpan, Shard
from shards.batch import Batch, InMemoryRows, RowSource, StreamedRows
from shards.integrity import repair_hint
from shards.manifest import Manifest, fault_message, find_cache
from shards.opened import OpenShards
from shards.order import Order, Pairs, ShuffledOrder, WeightedOrder
from shards.record import Record, RecordHeader, Split
from stages.system.refusal import Refused

Item = TypeVar("Item")
Result = TypeVar("Result")

PREFETCH_PER_WORKER = 2


def map_ahead(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`make` of each thing asked for, in their order; an error comes where its result would have come.

    Up to two results for each worker wait to be fetched; no worker makes nothing ahead.
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


Range = tuple[float, float]


class View(Strict):
    """Which samples of a cache are used; a sample must pass all of these."""

    classes: str = Field("*", description="glob over class names, such as star/* or */red")
    s_range: Range = Field(
        (0.0, 1.0), description="path times s, from the first number to below the second; an end of 1 counts too"
    )
    guidance_range: Range | None = Field(
        None, description="guidance scales that the pictures were painted with, both ends included; none takes all"
    )
    prompt_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the prompts; a smaller share lies inside every larger one"
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> "View":
        for name in ("s_range", "guidance_range"):
            span = getattr(self, name)
            if span and not span[0] <= span[1]:
                raise ValueError(f"{name} {span[0]} {span[1]} should rise")
        return self

    def includes_all(self) -> bool:
        """Whether nothing is left out, so that no record need be looked at."""
        return self == View()

    def includes(self, record: RecordHeader) -> bool:
        """Whether any draw of this record may be used."""
        lowest, highest = self.guidance_range or (-np.inf, np.inf)
        return (
            fnmatchcase(record.class_name, self.classes)
            and lowest <= record.guidance_scale <= highest
            and uniform_of_key(record.key) < self.prompt_fraction
        )

    def mask(self, records: Iterable[RecordHeader]) -> Bool[np.ndarray, " n"]:
        """For each draw of each record, whether it is used."""
        first, last = self.s_range
        found = []
        for record in records:
            s = np.array(record.s, dtype=np.float32)
            in_range = (first <= s) & ((s < last) | ((s == 1) & (last == 1)))
            found.append(in_range & self.includes(record))
        return np.concatenate(found)


def uniform_of_key(key: str) -> float:
    """A number in [0, 1) that belongs to a prompt for ever: it decides which fractions the prompt is in."""
    return int.from_bytes(hashlib.sha256(f"prompt {key}".encode()).digest()[:6], "big") / 2**48


Indices = Int[np.ndarray, " n"]

DEFAULT_MEMORY_BUDGET_BYTES = 2 << 30
MAX_WORKERS = 4


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
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
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
        self.shards = self.manifest.shards_of(split)
        if not self.shards:
            raise Refused(f"{self.folder}: holds no record of split {split} - {repair_hint(self.folder)}")
        for shard in self.shards:
            fault = shard.size_fault(self.folder)
            if fault:
                raise Refused(fault_message(self.folder, shard, fault))
        self._open_shards = OpenShards(self.folder)
        self.view, self._keys, self._weights = view or View(), keys, class_weights
        self._fits_memory = sum(shard.bytes for shard in self.shards) <= memory_budget_bytes
        useful = 0 if self._fits_memory else min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.workers = useful if workers is None else workers
        self._first_records = np.cumsum([0, *(shard.records for shard in self.shards)])

    @cached_property
    def pairs(self) -> Pairs:
        """The (record, draw) pairs of the view; raises `Refused` when there is none."""
        records = [shard.records for shard in self.shards]
        draws = np.repeat([shard.states_per_record for shard in self.shards], records)
        pairs = Pairs(draws, records, self._pair_mask())
        if not len(pairs):
            raise Refused(f"{self.folder}: no sample of split {self.split} is in the view {self.view!r} - widen it")
        return pairs

    def _pair_mask(self) -> Bool[np.ndarray, " n"] | None:
        """For each pair of the split whether it is in the stream; None where all are."""
        if self.view.includes_all() and self._keys is None:
            return None
        heads = list(self._headers(self.split))
        wanted = self.view.mask(heads)
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
    def timesteps(self) -> Indices:
        """The teacher's step k of each pair of the view."""
        k = np.concatenate([record.k for record in self._headers(self.split)])
        return k if self.pairs.selected is None else k[self.pairs.selected]

    def batches(self, start_sample: int = 0, order: Order | None = None) -> Iterator[Batch]:
        """Endless batches of this rank's samples from number `start_sample` (counted over all ranks) on.

        Another `order` of this reader's pairs may take the place of its own.
        """
        first = start_sample + (self.rank - start_sample) % self.world
        step = self.batch_size * self.world
        return self.read_places((np.arange(begin, begin + step, self.world) for begin in count(first, step)), order)

    def read_places(self, places: Iterable[Indices], order: Order | None = None) -> Iterator[Batch]:
        """For each set of places of the stream the rows there, in this order, read ahead."""
        order, rows = order or self.order, self._rows  # made here once, not by several threads at a time
        return map_ahead(lambda samples: rows.gather(*order.at(samples)), places, self.workers)

    def batch(self, samples: Indices) -> Batch:
        """The rows at these places of the stream."""
        return self._rows.gather(*self.order.at(samples))

    def class_names(self, split: Split | None = None) -> list[str]:
        """The class of each record of a split (this reader's own, unless told), in the order of its shards."""
        return [record.class_name for record in self._headers(split or self.split)]

    def headers(self) -> Iterator[RecordHeader]:
        """Every record of the split without its large tensors, in the order of its shards."""
        return self._headers(self.split)

    def records(self, split: Split | None = None) -> Iterator[Record]:
        """Every record of a split (this reader's own, unless told), in the order of its shards."""
        for shard in self.manifest.shards_of(split or self.split):
            for place in shard.offsets:
                yield self._open_shards.record(shard, place)

    def record(self, key: str, split: Split | None = None) -> Record:
        """The record with this key in a split (this reader's own, unless told)."""
        shards = self.manifest.shards_of(split or self.split)
        for shard in shards:
            if shard.first_key <= key <= shard.last_key:
                for place in shard.offsets:
                    if self._open_shards.header(shard, place).key == key:
                        return self._open_shards.record(shard, place)
        known = f"{shards[0].first_key} to {shards[-1].last_key}" if shards else "none"
        raise Refused(f"{self.folder}: no record {key} in split {split or self.split} - keys are {known}")

    def record_at(self, number: int) -> Record:
        """The record at a place of the split, from 0."""
        return self._open_shards.record(*self._locate(number))

    def _locate(self, number: int) -> tuple[Shard, RecordSpan]:
        at = int(np.searchsorted(self._first_records, number, side="right")) - 1
        shard = self.shards[at]
        return shard, shard.offsets[number - int(self._first_records[at])]

    def _headers(self, split: Split) -> Iterator[RecordHeader]:
        """Every record of a split without its large tensors; shards are checked several at a time."""

        def listed(shard: Shard) -> list[RecordHeader]:
            return [self._open_shards.header(shard, place) for place in shard.offsets]

        with ThreadPoolExecutor(MAX_WORKERS) as pool:
            yield from chain.from_iterable(pool.map(listed, self.manifest.shards_of(split)))

    @cached_property
    def _rows(self) -> RowSource:
        pinned = torch.cuda.is_available()
        if not self._fits_memory:
            return StreamedRows(self._open_shards, self._locate, pinned)
        return InMemoryRows(self.records(), self.pairs.starts, pinned, sum(shard.bytes for shard in self.shards))
