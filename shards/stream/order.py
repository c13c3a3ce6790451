"""The order of training as a function: sample number n -> (record, index of its state), with no state of its own.

An epoch is a bijection in two levels: the shards are permuted and dealt into windows of at most `WINDOW`, and all
samples of a window are permuted together, so that each shard of a long split is fetched once in an epoch.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from stages.system.refusal import Refused, did_you_mean

SAMPLES_PER_BLOCK = 4096
WINDOW = 16
"""Shards open at a time; it decides the order, so it is a constant."""
UNIFORM_STREAM, WEIGHTED_STREAM, SHARDS_STREAM = 0, 1, 2

Indices = Int[np.ndarray, " n"]


class Order(Protocol):
    """Which state of which record each sample of an endless stream is."""

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records, and the states within them, at these places of the stream (from 0)."""
        ...


class Pairs:
    """The (record, state) pairs of a split that are selected, numbered from 0 record by record."""

    def __init__(
        self,
        states_per_record: Indices,
        records_per_shard: Sequence[int] | None = None,
        mask: Bool[np.ndarray, " n"] | None = None,
    ) -> None:
        """By default all records lie in one shard and all pairs are selected; `mask` has a place for each pair."""
        self.starts = np.concatenate([[0], np.cumsum(states_per_record)])
        self.selected = None if mask is None or mask.all() else np.flatnonzero(mask)
        ends = self.starts[np.cumsum([len(states_per_record)] if records_per_shard is None else records_per_shard)]
        if self.selected is not None:
            ends = np.searchsorted(self.selected, ends)
        self.per_shard = tuple(np.diff(ends, prepend=0).tolist())

    def __len__(self) -> int:
        return sum(self.per_shard)

    def locate(self, numbers: Indices) -> tuple[Indices, Indices]:
        """The record of each pair, and the state within it."""
        numbers = numbers if self.selected is None else self.selected[numbers]
        records = np.searchsorted(self.starts, numbers, side="right") - 1
        return records, numbers - self.starts[records]


class ShuffledOrder:
    """Every pair once in each epoch, shuffled anew; sample n is at place n mod N of epoch n div N."""

    def __init__(self, seed: int, pairs: Pairs) -> None:
        self.seed, self.pairs = seed, pairs

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records and states at these places."""
        epochs, places = np.divmod(samples, len(self.pairs))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = epoch_order(self.seed, int(epoch), self.pairs.per_shard).at(places[here])
        return self.pairs.locate(numbers)


class Epoch:
    """The order of one epoch: place -> pair number; any place costs no more than its own window."""

    def __init__(self, seed: int, epoch: int, per_shard: tuple[int, ...]) -> None:
        self._seed, self._epoch = seed, epoch
        ends = np.cumsum(per_shard)
        self._spans = np.stack([ends - per_shard, ends], axis=1)
        filled = np.flatnonzero(per_shard)
        shuffled = filled[permutation((SHARDS_STREAM, seed, epoch), len(filled))]
        self._windows = [np.sort(shards) for shards in np.array_split(shuffled, -(-len(filled) // WINDOW))]
        self.starts = np.cumsum([0, *(sum(per_shard[shard] for shard in shards) for shards in self._windows)])

    def at(self, places: Indices) -> Indices:
        """The pair numbers at these places of the epoch."""
        windows = np.searchsorted(self.starts, places, side="right") - 1
        numbers = np.empty_like(places)
        for window in np.unique(windows):
            here = windows == window
            spans = tuple(map(tuple, self._spans[self._windows[window]].tolist()))
            order = _window_numbers(self._seed, self._epoch, int(window), spans)
            numbers[here] = order[places[here] - self.starts[window]]
        return numbers


epoch_order = lru_cache(maxsize=4)(Epoch)


@lru_cache(maxsize=4)
def _window_numbers(seed: int, epoch: int, window: int, spans: tuple[tuple[int, int], ...]) -> Indices:
    """The pair numbers of these spans, permuted together."""
    numbers: Indices = np.concatenate([np.arange(first, last) for first, last in spans])
    # The first window has the epoch's own key, so that what fits into one keeps the order it had before windows.
    key = (UNIFORM_STREAM, seed, epoch) if window == 0 else (UNIFORM_STREAM, seed, epoch, window)
    return np.take(numbers, permutation(key, len(numbers)))


class GroupedOrder:
    """Samples with replacement: a group of pairs by its share, then one of its pairs uniformly."""

    def __init__(self, seed: int, pairs: Pairs, group_of_pair: Indices, shares: Float[np.ndarray, " groups"]) -> None:
        """`shares` are relative to their sum; a group of share 0 never comes and may be empty, any other has pairs."""
        self.seed, self.pairs = seed, pairs
        sizes = np.bincount(group_of_pair, minlength=len(shares))
        if (shares < 0).any() or not shares.any() or (sizes[shares > 0] == 0).any():
            raise ValueError("every share should be 0, or positive with pairs to sample from")
        # Groups of share 0 have no place of their own: the last place takes what rounding leaves over.
        present = np.flatnonzero(shares)
        self._upper_bounds = (np.cumsum(shares) / shares.sum())[present]
        self._pairs_by_group = np.argsort(group_of_pair, kind="stable")
        self._sizes, self._starts = sizes[present], (np.cumsum(sizes) - sizes)[present]

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records and states at these places."""
        chance = np.empty((len(samples), 2))
        for block in np.unique(samples // SAMPLES_PER_BLOCK):
            here = samples // SAMPLES_PER_BLOCK == block
            chance[here] = chances(self.seed, int(block))[samples[here] % SAMPLES_PER_BLOCK]
        # Rounding can leave the last boundary a hair below 1, and a product a hair below a whole number at it.
        chosen = np.searchsorted(self._upper_bounds[:-1], chance[:, 0], side="right")
        within = np.minimum((chance[:, 1] * self._sizes[chosen]).astype(np.int64), self._sizes[chosen] - 1)
        return self.pairs.locate(self._pairs_by_group[self._starts[chosen] + within])


class WeightedOrder(GroupedOrder):
    """Samples with replacement: a class by its weight, then one of its pairs uniformly.

    A class's share of the stream is its weight over the sum of weights, however many records it has.
    """

    def __init__(self, seed: int, pairs: Pairs, class_names: Sequence[str], weights: Mapping[str, float]) -> None:
        """`class_names` has one name for each record; raises `Refused` unless weights and classes of `pairs` match."""
        (class_of_pair,), shares = classes_of_pairs([pairs], class_names, weights)
        super().__init__(seed, pairs, class_of_pair, shares)


def classes_of_pairs(
    pairs: Sequence[Pairs], class_names: Sequence[str], weights: Mapping[str, float]
) -> tuple[list[Indices], Float[np.ndarray, " classes"]]:
    """For each size the number of the class of each of its pairs, and the weight of each class.

    `class_names` has one name for each record; raises `Refused` unless weights and classes of all pairs match.
    """
    record_of_pair = [of_size.locate(np.arange(len(of_size)))[0] for of_size in pairs]
    names = _ordered_classes([class_names[record] for record in np.unique(np.concatenate(record_of_pair))], weights)
    number = {name: i for i, name in enumerate(names)}
    class_of_record = np.array([number.get(name, -1) for name in class_names])
    return [class_of_record[of_size] for of_size in record_of_pair], np.array([weights[n] for n in names], np.float64)


def _ordered_classes(class_names: Sequence[str], weights: Mapping[str, float]) -> list[str]:
    """The classes in the order in which they share the unit interval."""
    present = sorted(set(class_names))
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise Refused(f"class {name}: weight {weight} - should be zero or a positive number")
        if weight > 0 and name not in present:
            raise Refused(f"class {name}: has a weight and no record - {did_you_mean(name, present)}")
    for name in present:
        if name not in weights:
            raise Refused(f"class {name}: has records and no weight - give it one, 0 to leave it out")
    if not any(weights[name] > 0 for name in present):
        raise Refused("class weights: all are 0 - give at least one class a positive weight")
    # Weights are summed in this order, and a sum's last digit depends on it.
    return sorted(present, key=lambda name: (weights[name] > 0, name))


def permutation(key: tuple[int, ...], n: int) -> Indices:
    """The permutation of n that belongs to a key."""
    return np.random.Generator(np.random.PCG64(list(key))).permutation(n)


@lru_cache(maxsize=4)
def chances(seed: int, block: int) -> Float[np.ndarray, "SAMPLES_PER_BLOCK 2"]:
    """Two uniform numbers for each sample of a block, so that any sample is computed without those before it."""
    return np.random.Generator(np.random.PCG64([WEIGHTED_STREAM, seed, block])).random((SAMPLES_PER_BLOCK, 2))
