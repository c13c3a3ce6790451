"""Shards -> records -> batches, in an order that is a function of the sample's number, read ahead in threads."""

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
from jaxtyping import Bool
from pydantic import Field, model_validator

from configs.values import Strict
from shards.archive import RecordSpan, Shard
from shards.batch import Batch, InMemoryRows, StreamedRows
from shards.integrity import repair_hint
from shards.manifest import Manifest, fault_message, find_cache
from shards.opened import OpenShards
from shards.order import Indices, Order, Pairs, ShuffledOrder, WeightedOrder
from shards.record import Record, RecordHeader, Split
from stages.system.refusal import Refused

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT_MEMORY_BUDGET_BYTES = 2 << 30
MAX_WORKERS = 4
PREFETCH_PER_WORKER = 2


class View(Strict):
    """Which samples of a cache are used; a sample must pass all of these."""

    classes: str = Field("*", description="glob over class names, such as star/* or */red")
    s_range: tuple[float, float] = Field(
        (0.0, 1.0), description="path times s, from the first number to below the second; an end of 1 is included"
    )
    guidance_range: tuple[float, float] | None = Field(
        None, description="guidance scales of the generated pictures, both ends included; none takes all"
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
        """Whether nothing is left out, so that no header need be read."""
        return self == View()

    def includes(self, record: RecordHeader) -> bool:
        """Whether any state of this record may be used."""
        lowest, highest = self.guidance_range or (-np.inf, np.inf)
        return (
            fnmatchcase(record.class_name, self.classes)
            and lowest <= record.guidance_scale <= highest
            and uniform_of_key(record.key) < self.prompt_fraction
        )

    def mask(self, records: Iterable[RecordHeader]) -> Bool[np.ndarray, " n"]:
        """For each state of each record, whether it is used."""
        first, last = self.s_range
        masks = []
        for record in records:
            s = np.array(record.s, dtype=np.float32)
            in_range = (first <= s) & ((s < last) | ((s == 1) & (last == 1)))
            masks.append(in_range & self.includes(record))
        return np.concatenate(masks)


def uniform_of_key(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: a prompt is in every fraction above it."""
    return int.from_bytes(hashlib.sha256(f"prompt {key}".encode()).digest()[:6], "big") / 2**48


class Reader:
    """One split of a cache as an endless stream of samples, a sample being one state of one record.

    The stream has no other state than the number of the next sample: rank r of `world` takes the samples n with
    n mod world = r, so a run resumes at any number with any world size, and every batch is full. The number of threads
    changes only the time.
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
        it samples classes by weight (`WeightedOrder`), else it shuffles all samples in each epoch (`ShuffledOrder`).
        A split of up to `memory_budget_bytes` is held in memory. `workers` threads read ahead, 0 for none; by
        default as many as the processors make useful.
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
            if fault := shard.size_fault(self.folder):
                raise Refused(fault_message(self.folder, shard, fault))
        self._open_shards = OpenShards(self.folder)
        self.view, self._keys, self._weights = view or View(), keys, class_weights
        self._fits_memory = sum(shard.bytes for shard in self.shards) <= memory_budget_bytes
        useful = 0 if self._fits_memory else min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.workers = useful if workers is None else workers
        self._first_records = np.cumsum([0, *(shard.records for shard in self.shards)])

    @cached_property
    def pairs(self) -> Pairs:
        """The (record, state) pairs of the stream; raises `Refused` when there is none."""
        records = [shard.records for shard in self.shards]
        states = np.repeat([shard.states_per_record for shard in self.shards], records)
        pairs = Pairs(states, records, self._pair_mask())
        if not len(pairs):
            raise Refused(f"{self.folder}: no sample of split {self.split} is in the view {self.view!r} - widen it")
        return pairs

    def _pair_mask(self) -> Bool[np.ndarray, " n"] | None:
        """For each pair of the split whether it is in the stream; None where all are."""
        if self.view.includes_all() and self._keys is None:
            return None
        headers = list(self.headers())
        mask = self.view.mask(headers)
        if self._keys is not None:
            keys = set(self._keys)
            mask &= np.repeat([header.key in keys for header in headers], [len(header.s) for header in headers])
        return mask

    @property
    def samples_per_epoch(self) -> int:
        """Number of (record, state) pairs in the stream."""
        return len(self.pairs)

    @cached_property
    def order(self) -> Order:
        """Which sample is which state of which record."""
        if self._weights is None:
            return ShuffledOrder(self.seed, self.pairs)
        return WeightedOrder(self.seed, self.pairs, self.class_names(), self._weights)

    @cached_property
    def timesteps(self) -> Indices:
        """The teacher's step k of each pair of the stream."""
        k = np.concatenate([record.k for record in self.headers()])
        return k if self.pairs.selected is None else k[self.pairs.selected]

    def batches(self, start_sample: int = 0, order: Order | None = None) -> Iterator[Batch]:
        """Endless batches of this rank's samples from number `start_sample` (counted over all ranks) on.

        Another `order` of this reader's pairs may take the place of its own.
        """
        first = start_sample + (self.rank - start_sample) % self.world
        step = self.batch_size * self.world
        return self.read_places((np.arange(begin, begin + step, self.world) for begin in count(first, step)), order)

    def read_places(self, places: Iterable[Indices], order: Order | None = None) -> Iterator[Batch]:
        """A batch for each set of places of the stream, in this order, read ahead."""
        order, rows = order or self.order, self._rows  # made here once, not in several threads
        return map_ahead(lambda samples: rows.gather(*order.at(samples)), places, self.workers)

    def batch(self, samples: Indices) -> Batch:
        """The rows at these places of the stream."""
        return self._rows.gather(*self.order.at(samples))

    def class_names(self, split: Split | None = None) -> list[str]:
        """The class of each record of a split (default: this reader's), in the order of its shards."""
        return [record.class_name for record in self.headers(split)]

    def headers(self, split: Split | None = None) -> Iterator[RecordHeader]:
        """The records of a split (default: this reader's) without their large tensors, in the order of its shards."""

        def of_shard(shard: Shard) -> list[RecordHeader]:
            return [self._open_shards.header(shard, span) for span in shard.offsets]

        with ThreadPoolExecutor(MAX_WORKERS) as pool:  # each checks the sha256 of its shard
            yield from chain.from_iterable(pool.map(of_shard, self.manifest.shards_of(split or self.split)))

    def records(self, split: Split | None = None) -> Iterator[Record]:
        """Every record of a split (default: this reader's), in the order of its shards."""
        for shard in self.manifest.shards_of(split or self.split):
            for span in shard.offsets:
                yield self._open_shards.record(shard, span)

    def record(self, key: str, split: Split | None = None) -> Record:
        """The record with this key in a split (default: this reader's)."""
        shards = self.manifest.shards_of(split or self.split)
        for shard in shards:
            if shard.first_key <= key <= shard.last_key:
                for span in shard.offsets:
                    if self._open_shards.header(shard, span).key == key:
                        return self._open_shards.record(shard, span)
        known = f"{shards[0].first_key} to {shards[-1].last_key}" if shards else "none"
        raise Refused(f"{self.folder}: no record {key} in split {split or self.split} - keys are {known}")

    def record_at(self, number: int) -> Record:
        """The record at a place of the split, from 0."""
        return self._open_shards.record(*self._locate(number))

    def _locate(self, number: int) -> tuple[Shard, RecordSpan]:
        at = int(np.searchsorted(self._first_records, number, side="right")) - 1
        shard = self.shards[at]
        return shard, shard.offsets[number - int(self._first_records[at])]

    @cached_property
    def _rows(self) -> InMemoryRows | StreamedRows:
        pinned = torch.cuda.is_available()
        if not self._fits_memory:
            return StreamedRows(self._open_shards, self._locate, pinned)
        return InMemoryRows(self.records(), self.pairs.starts, pinned, sum(shard.bytes for shard in self.shards))


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
