"""The order of training as a function: sample number n -> (record, draw), with no state to save or restore."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from configs.refusal import Refused, did_you_mean

BLOCK = 4096
UNIFORM, WEIGHTED = 0, 1

Indices = Int[np.ndarray, " n"]


class Order(Protocol):
    """Which draw of which record each sample of an endless stream is."""

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records, and the draws within them, at these places of the stream (from 0)."""
        ...


class Pairs:
    """All (record, draw) pairs of a split, numbered from 0 record by record."""

    def __init__(self, draws_per_record: Indices) -> None:
        self.starts = np.concatenate([[0], np.cumsum(draws_per_record)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def split(self, numbers: Indices) -> tuple[Indices, Indices]:
        """The record of each pair, and the draw within it."""
        records = np.searchsorted(self.starts, numbers, side="right") - 1
        return records, numbers - self.starts[records]


class UniformOrder:
    """A fresh permutation of all pairs in every epoch; sample n is at place n mod N of epoch n div N."""

    def __init__(self, seed: int, pairs: Pairs) -> None:
        self.seed, self.pairs = seed, pairs

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records and draws at these places of the stream."""
        epochs, places = np.divmod(samples, len(self.pairs))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = permutation(self.seed, int(epoch), len(self.pairs))[places[here]]
        return self.pairs.split(numbers)


class WeightedOrder:
    """Draws with replacement: a class by its weight, then one of its pairs, all alike.

    A class's share of the stream is its weight over the sum of weights, however many records it has.
    """

    def __init__(self, seed: int, pairs: Pairs, class_names: Sequence[str], weights: Mapping[str, float]) -> None:
        """`class_names` has one name for each record; raises `Refused` unless weights and classes match."""
        self.seed, self.pairs = seed, pairs
        names = _checked(class_names, weights)
        shares = np.array([weights[name] for name in names], dtype=np.float64)
        self._until = np.cumsum(shares) / shares.sum()
        number = {name: i for i, name in enumerate(names)}
        class_of_pair = np.repeat([number[name] for name in class_names], np.diff(pairs.starts))
        self._by_class = np.argsort(class_of_pair, kind="stable")
        self._sizes = np.bincount(class_of_pair, minlength=len(names))
        self._starts = np.cumsum(self._sizes) - self._sizes

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records and draws at these places of the stream."""
        chance = np.empty((len(samples), 2))
        for block in np.unique(samples // BLOCK):
            here = samples // BLOCK == block
            chance[here] = chances(self.seed, int(block))[samples[here] % BLOCK]
        # Rounding can leave the last boundary a hair below 1, and a product a hair below a whole number at it.
        chosen = np.searchsorted(self._until[:-1], chance[:, 0], side="right")
        within = np.minimum((chance[:, 1] * self._sizes[chosen]).astype(np.int64), self._sizes[chosen] - 1)
        return self.pairs.split(self._by_class[self._starts[chosen] + within])


def _checked(class_names: Sequence[str], weights: Mapping[str, float]) -> list[str]:
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
    # Last place must not be a class of weight 0: it takes what rounding leaves over.
    return sorted(present, key=lambda name: (weights[name] > 0, name))


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> Indices:
    """The order of n things in an epoch."""
    return np.random.Generator(np.random.PCG64([UNIFORM, seed, epoch])).permutation(n)


@lru_cache(maxsize=4)
def chances(seed: int, block: int) -> Float[np.ndarray, "BLOCK 2"]:
    """Two uniform numbers for each sample of a block, so that any sample is found without those before it."""
    return np.random.Generator(np.random.PCG64([WEIGHTED, seed, block])).random((BLOCK, 2))
