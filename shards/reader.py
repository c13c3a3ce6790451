"""Shards -> records -> batches, in an order that is a function of the sample's number, read ahead in threads."""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool

from configs.values import PictureSize
from shards.archive import RecordSpan, Shard
from shards.batch import Batch, map_ahead
from shards.integrity import repair_hint
from shards.manifest import Manifest, fault_message, find_cache
from shards.opened import OpenShards
from shards.record import Record, RecordHeader, Split
from shards.rows import InMemoryRows, StreamedRows
from shards.stream.order import Indices, Order, Pairs, ShuffledOrder, classes_of_pairs
from shards.stream.schedule import Block, SizedOrder, SizeSchedule, grouped_by_size, seed_of_size
from shards.stream.view import View
from stages.system.refusal import Refused

DEFAULT_MEMORY_BUDGET_BYTES = 2 << 30
MAX_WORKERS = 4


class Reader:
    """One split of a cache as an endless stream of samples, a sample being one state of one record.

    The stream has no other state than the number of the next sample: rank r of `world` takes the samples n with
    n mod world = r, so a run resumes at any batch with any world size, and every batch is full. The number of threads
    changes only the time. Pictures of several sizes come in batches of one size each, by `schedule`.
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
        batch_pixels: int | None = None,
        unstated_size: PictureSize | None = None,
        landings: bool = False,
        x0: bool = False,
    ) -> None:
        """`folder` is a cache or a run folder; `batch_size` counts the rows of one rank, of every size.

        With `batch_pixels` a batch of all ranks together has as many rows as this number of pixels holds, at least one.
        `unstated_size` is the size of the pictures of a cache of schema 1, which does not tell it.
        With `landings` a batch has `TRAJECTORY_FIELDS` too; of a cache without any, x0 is the one landing. With `x0` it
        has the pictures.
        Only the samples of `view` are in the stream, and with `keys` only those of these records. With `class_weights`
        it samples classes by weight (`WeightedOrder`), else it shuffles all samples in each epoch (`ShuffledOrder`).
        A split of up to `memory_budget_bytes` is held in memory. `workers` threads read ahead, 0 for none; by
        default as many as the processors make useful.
        Raises `Refused` where a shard is missing or cut; its content is checked when first read.
        """
        if not 0 <= rank < world or min(batch_size, batch_pixels or 1) < 1 or (workers or 0) < 0:
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
        self._batch_pixels, self._unstated_size, self._landings, self._x0 = batch_pixels, unstated_size, landings, x0
        self.view, self._keys, self._weights = view or View(), keys, class_weights
        chosen = [shard for shard in self.shards if self.view.size in (None, self._size_of(shard))]
        several = len({one.size for one in chosen}) or 1
        largest = max(shard.bytes for shard in self.manifest.shards)
        self._open_shards = OpenShards(self.folder, several, self.manifest.schema_version, largest)
        self._fits_memory = sum(shard.bytes for shard in chosen) <= memory_budget_bytes
        useful = 0 if self._fits_memory else min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.workers = useful if workers is None else workers
        self._first_records = np.cumsum([0, *(shard.records for shard in self.shards)])

    def _size_of(self, shard: Shard) -> PictureSize | None:
        return shard.size or self._unstated_size

    @cached_property
    def pairs(self) -> Pairs:
        """The (record, state) pairs of the stream, of all sizes; raises `Refused` when there is none."""
        if (size := self.view.size) is not None and size not in (sizes := self._all_sizes()):
            known = f"take {', '.join(map(str, sizes))}"
            raise Refused(f"{self.folder}: no picture of split {self.split} is {size} (view.size) - {known}")
        pairs = self._select(self._pair_mask)
        if not len(pairs):
            raise Refused(f"{self.folder}: no sample of split {self.split} is in the view {self.view!r} - widen it")
        return pairs

    @cached_property
    def sizes(self) -> tuple[PictureSize | None, ...]:
        """The sizes of the pictures of the stream, by width and height; (None,) where the cache does not tell it."""
        return tuple(self._pairs_by_size)

    @property
    def pairs_of_sizes(self) -> tuple[Pairs, ...]:
        """The pairs of each size of `sizes`, numbered from 0."""
        return tuple(self._pairs_by_size.values())

    @cached_property
    def _pairs_by_size(self) -> dict[PictureSize | None, Pairs]:
        whole = self.pairs  # refused where there is none
        if len({shard.size for shard in self.shards}) == 1:
            return {self._size_of(self.shards[0]): whole}
        pairs = {size: self._select(self._pair_mask & self._is_of_size(size)) for size in self._all_sizes()}
        return {size: of_size for size, of_size in pairs.items() if len(of_size)}

    def _select(self, mask: Bool[np.ndarray, " n"]) -> Pairs:
        records = [shard.records for shard in self.shards]
        return Pairs(np.repeat([shard.states_per_record for shard in self.shards], records), records, mask)

    def _all_sizes(self) -> list[PictureSize | None]:
        return [size or self._unstated_size for size in self.manifest.sizes_of(self.split)]

    def _is_of_size(self, size: PictureSize | None) -> Bool[np.ndarray, " n"]:
        """For each pair of the split whether its picture has this size."""
        of_size = np.array([self._size_of(shard) == size for shard in self.shards], dtype=bool)
        return np.repeat(of_size, [shard.draws for shard in self.shards])

    @cached_property
    def _pair_mask(self) -> Bool[np.ndarray, " n"]:
        """For each pair of the split whether it is in the stream."""
        size = self.view.size
        mask = np.ones(sum(shard.draws for shard in self.shards), bool) if size is None else self._is_of_size(size)
        if self.view.needs_headers() or self._keys is not None:
            headers = list(self.headers())
            mask &= self.view.mask(headers)
            if self._keys is not None:
                keys = set(self._keys)
                mask &= np.repeat([header.key in keys for header in headers], [len(header.s) for header in headers])
        return mask

    @property
    def samples_per_epoch(self) -> int:
        """Number of (record, state) pairs in the stream."""
        return len(self.pairs)

    def rows_of(self, size: PictureSize | None) -> int:
        """The rows of a batch of this size, of all ranks together.

        Raises `Refused` where they do not divide among the ranks, or pixels are to be counted and the size is unknown.
        """
        if self._batch_pixels is None:
            return self.batch_size * self.world
        if size is None:
            raise Refused(f"{self.folder}: does not tell the size of its pictures - give a batch size, not its pixels")
        rows = max(1, self._batch_pixels // size.pixels)
        if rows % self.world:
            raise Refused(
                f"batch_pixels = {self._batch_pixels}: gives {rows} rows at {size}, which do not divide among "
                f"{self.world} processes - take a multiple of {self.world * size.pixels}"
            )
        return rows

    @cached_property
    def schedule(self) -> SizeSchedule:
        """Which size each batch has, and how many rows."""
        return self._sized_order.schedule

    @cached_property
    def order(self) -> Order:
        """Which sample is which state of which record."""
        return self._sized_order

    @cached_property
    def _sized_order(self) -> SizedOrder:
        pairs, rows, shares = self.pairs_of_sizes, [*map(self.rows_of, self.sizes)], None
        orders: Sequence[Order | None] = [ShuffledOrder(*given) for given in zip(self.seeds, pairs, strict=True)]
        if self._weights is not None:
            classes, weights = classes_of_pairs(pairs, self.class_names(), self._weights)
            orders, shares = grouped_by_size(self.seeds, pairs, classes, weights)
        return SizedOrder(orders, SizeSchedule([*map(len, pairs)] if shares is None else shares.tolist(), rows))

    @property
    def orders(self) -> tuple[Order | None, ...]:
        """The order of the stream of each size of `sizes`; None for one that never comes."""
        return self._sized_order.orders

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of the stream of each size of `sizes`."""
        several = len(self.sizes) > 1
        return tuple(seed_of_size(self.seed, size) if several else self.seed for size in self.sizes)

    @property
    def timesteps_of_sizes(self) -> tuple[Indices, ...]:
        """The teacher's step k of each pair of each size, as `pairs_of_sizes` number them."""
        starts = self.pairs.starts
        return tuple(self._steps[starts[r] + i] for r, i in (p.locate(np.arange(len(p))) for p in self.pairs_of_sizes))

    @cached_property
    def _steps(self) -> Indices:
        return np.concatenate([record.k for record in self.headers()])

    def batches(self, start_sample: int = 0, order: Order | None = None) -> Iterator[Batch]:
        """Endless batches of this rank's samples from number `start_sample` (counted over all ranks) on.

        Another `order` of this reader's pairs may take the place of its own: with several sizes, one by `schedule`.
        Raises `ValueError` for a start inside a batch, unless there is one size, whose batches may begin anywhere.
        """
        blocks = self.schedule.blocks(start_sample)
        return self.read_places((self.own_samples(block) for block in blocks), order)

    def own_samples(self, block: Block) -> Indices:
        """The samples of a block of the schedule that are this rank's, in the order of its rows."""
        return np.arange(block.first + (self.rank - block.first) % self.world, block.first + block.rows, self.world)

    def read_places(self, places: Iterable[Indices], order: Order | None = None) -> Iterator[Batch]:
        """A batch for each set of places of the stream, in this order, read ahead; a set has pictures of one size."""
        order, _ = order or self.order, self._rows  # made here once, not in several threads
        if not self._fits_memory:
            places = self._open_shards.obtained_ahead(
                places, self.shards, lambda samples: {*map(int, self._shard_numbers(order.at(samples)[0]))}
            )
        return map_ahead(lambda samples: self.gather(*order.at(samples)), places, self.workers)

    def batch(self, samples: Indices) -> Batch:
        """The rows at these places of the stream, whose pictures have one size."""
        return self.gather(*self.order.at(samples))

    def gather(self, records: Indices, state_indices: Indices) -> Batch:
        """The states of these records of the split, which have pictures of one size."""
        sizes = {self._size_of(self.shards[shard]) for shard in np.unique(self._shard_numbers(records))}
        if len(sizes) > 1:
            raise ValueError(f"rows of {len(sizes)} sizes in one batch: {', '.join(sorted(map(str, sizes)))}")
        (size,) = sizes
        batch = self._rows[size].gather(records, state_indices)
        return batch if batch.size == size else replace(batch, size=size)

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
        return self._open_shards.records(self.manifest.shards_of(split or self.split))

    def record(self, key: str, split: Split | None = None) -> Record:
        """The record with this key in a split (default: this reader's)."""
        shards = self.manifest.shards_of(split or self.split)
        for shard, span in ((one, at) for one in shards if one.first_key <= key <= one.last_key for at in one.offsets):
            if self._open_shards.header(shard, span).key == key:
                return self._open_shards.record(shard, span)
        known = f"{shards[0].first_key} to {shards[-1].last_key}" if shards else "none"
        raise Refused(f"{self.folder}: no record {key} in split {split or self.split} - keys are {known}")

    def record_at(self, number: int) -> Record:
        """The record at a place of the split, from 0."""
        return self._open_shards.record(*self._locate(number))

    def _locate(self, number: int) -> tuple[Shard, RecordSpan]:
        at = int(self._shard_numbers(np.array(number)))
        return self.shards[at], self.shards[at].offsets[number - int(self._first_records[at])]

    def _shard_numbers(self, records: Indices) -> Indices:
        """The place in `shards` of the shard that holds each of these records."""
        return np.searchsorted(self._first_records, records, side="right") - 1

    @cached_property
    def _rows(self) -> Mapping[PictureSize | None, InMemoryRows | StreamedRows]:
        """The rows of each size of the stream."""
        pinned = torch.cuda.is_available()
        if not self._fits_memory:
            rows = StreamedRows(self._open_shards, self._locate, pinned, self._landings, self._x0)
            return dict.fromkeys(self._all_sizes(), rows)
        return {size: self._load(size, pinned) for size in self.sizes}

    def _load(self, size: PictureSize | None, pinned: bool) -> InMemoryRows:
        numbers = [number for number, shard in enumerate(self.shards) if self._size_of(shard) == size]
        shards = [self.shards[number] for number in numbers]  # one after the other, since their names are sorted
        first, last = (int(self._first_records[number]) for number in (numbers[0], numbers[-1] + 1))
        starts = self.pairs.starts[first : last + 1]
        records, bytes_of_all = self._open_shards.records(shards), sum(shard.bytes for shard in shards)
        return InMemoryRows(records, starts - starts[0], pinned, bytes_of_all, first, self._landings, self._x0)
