"""Streams of pictures of several sizes as one, in blocks: a block is one batch of all processes together, of one size.

Each size has a stream of its own, and a schedule says which size each block has. Both are functions of a number.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from shards.stream.order import GroupedOrder, Indices, Order, Pairs


def grouped_by_size(
    seeds: Sequence[int],
    pairs: Sequence[Pairs],
    groups: Sequence[Indices],
    shares: Float[np.ndarray, " groups"],
) -> tuple[list[GroupedOrder | None], Float[np.ndarray, " sizes"]]:
    """A `GroupedOrder` for each picture size, and W_z, the share of the samples that belongs to each size z.

    `groups` has for each size the group of each of its pairs. A group's share q_g is spread evenly over its pairs of
    all sizes: within size z a group comes with probability q_g N_gz / N_g / W_z, and W_z is the sum over g of the
    numerators. Where the sizes come by W, the shares of the groups come out jointly; where they come by p_z, a pair
    of group g and size z comes p_z / W_z times as often. A size with W_z = 0 has no order.
    """
    counts = np.stack([np.bincount(of_size, minlength=len(shares)) for of_size in groups])
    in_size = shares / shares.sum() * counts / np.maximum(counts.sum(axis=0), 1)
    if len(groups) == 1:
        in_size = shares[None]  # as it is: a sum's last digit depends on its scale
    of_size = in_size.sum(axis=1)
    orders = [
        GroupedOrder(*given) if share else None
        for share, *given in zip(of_size, seeds, pairs, groups, in_size, strict=True)
    ]
    return orders, of_size / of_size.sum()


def seed_of_size(seed: int, size: object) -> int:
    """The seed of one size's stream where there are several, so that no two sizes take their chances together."""
    return int.from_bytes(hashlib.sha256(f"size {size} {seed}".encode()).digest()[:7], "big")


class Split2(NamedTuple):
    """Blocks dealt between two parts of the sizes in the ratio `left` to `right`, as evenly as whole blocks can be."""

    left: int
    right: int
    parts: tuple["Split2 | int", "Split2 | int"]

    def left_of(self, blocks: int) -> int:
        """How many of the first `blocks` belong to the left part: the nearest whole number."""
        both = self.left + self.right
        return (2 * blocks * self.left + both) // (2 * both)


class Block(NamedTuple):
    """One batch of all processes together."""

    size: int
    """number of its picture size"""
    first: int
    """its first sample in the stream of all sizes"""
    rows: int


class SizeSchedule:
    """Which size each block of an endless stream has: a function of the block's number, with no state.

    The sizes are halved again and again, and each half gets its blocks as evenly as whole blocks can be dealt. So of up
    to 2^d sizes each is at most d / 2 blocks from its exact share of the blocks at any moment, and less if d > 1. After
    any number of blocks of which every share is whole, all shares are exact.
    """

    def __init__(self, samples: Sequence[float | Fraction], rows: Sequence[int]) -> None:
        """For each size its number of samples, or share of them, and the rows of a block; a size of 0 never comes."""
        self.samples, self.rows = tuple(samples), tuple(rows)
        blocks = [Fraction(number) / of_block for number, of_block in zip(samples, rows, strict=True)]
        self._root = _split([n for n in sorted(range(len(blocks)), key=lambda n: -blocks[n]) if blocks[n]], blocks)

    def counts(self, blocks: int) -> list[int]:
        """How many of the first `blocks` have each size."""
        counts = [0] * len(self.rows)

        def deal(part: Split2 | int, number: int) -> None:
            if isinstance(part, int):
                counts[part] = number
                return
            left = part.left_of(number)
            deal(part.parts[0], left)
            deal(part.parts[1], number - left)

        deal(self._root, blocks)
        return counts

    def size_of_block(self, number: int) -> int:
        """The size of block `number`, from 0."""
        part = self._root
        while not isinstance(part, int):
            left = part.left_of(number)
            is_left = part.left_of(number + 1) > left
            part, number = (part.parts[0], left) if is_left else (part.parts[1], number - left)
        return part

    def first_sample(self, block: int) -> int:
        """The first sample of a block: the samples of all blocks before it."""
        return sum(number * of_block for number, of_block in zip(self.counts(block), self.rows, strict=True))

    def block_of(self, sample: int) -> int:
        """The number of the block in which a sample lies."""
        most = sample // min(self.rows) + 1
        return bisect_right(range(most + 1), sample, key=self.first_sample) - 1

    def boundary(self, sample: int) -> int:
        """The first sample of a block that is not before this one."""
        block = self.block_of(sample)
        first = self.first_sample(block)
        return first if first == sample else first + self.rows[self.size_of_block(block)]

    def blocks(self, start_sample: int = 0) -> Iterator[Block]:
        """The blocks from this sample on; raises `ValueError` when it is inside one, unless there is one size only."""
        if isinstance(self._root, int):
            rows = self.rows[self._root]
            yield from (Block(self._root, first, rows) for first in count(start_sample, rows))
        block = self.block_of(start_sample)
        first = self.first_sample(block)
        if first != start_sample:
            raise ValueError(f"sample {start_sample} is {start_sample - first} rows into a batch")
        for number in count(block):
            size = self.size_of_block(number)
            yield Block(size, first, self.rows[size])
            first += self.rows[size]

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The size of each sample, and its place in the stream of that size."""
        sizes, places = np.zeros_like(samples), np.array(samples)
        if isinstance(self._root, int):
            return sizes + self._root, places
        rising = np.argsort(samples, kind="stable")
        done = 0
        while done < len(samples):
            block = self.block_of(int(samples[rising[done]]))
            first, counts = self.first_sample(block), self.counts(block)
            for number in count(block):  # on to the blocks after it, as long as there is a sample in them
                size = self.size_of_block(number)
                here = rising[done : np.searchsorted(samples, first + self.rows[size], sorter=rising)]
                if not len(here):
                    break
                sizes[here], places[here] = size, samples[here] - first + counts[size] * self.rows[size]
                first, done, counts[size] = first + self.rows[size], done + len(here), counts[size] + 1
        return sizes, places


def _split(sizes: Sequence[int], blocks: Sequence[Fraction]) -> Split2 | int:
    """The halving of these sizes, which are sorted by their shares, so that like is dealt with like."""
    if len(sizes) == 1:
        return sizes[0]
    halves = sizes[: (len(sizes) + 1) // 2], sizes[(len(sizes) + 1) // 2 :]
    left, right = (sum((blocks[n] for n in half), Fraction()) for half in halves)
    ratio = left / right
    return Split2(ratio.numerator, ratio.denominator, (_split(halves[0], blocks), _split(halves[1], blocks)))


class SizedOrder:
    """The streams of several sizes as one, block by block by a schedule."""

    def __init__(self, orders: Sequence[Order | None], schedule: SizeSchedule) -> None:
        """An order for each size of the schedule, in the same order; None for a size that never comes."""
        if any(order is None and share for order, share in zip(orders, schedule.samples, strict=True)):
            raise ValueError("every size that comes should have an order")
        self.orders, self.schedule = tuple(orders), schedule

    def at(self, samples: Indices) -> tuple[Indices, Indices]:
        """The records and states at these places."""
        sizes, places = self.schedule.at(samples)
        records, states = np.empty_like(places), np.empty_like(places)
        for number, order in enumerate(self.orders):
            here = sizes == number
            if order is not None and here.any():
                records[here], states[here] = order.at(places[here])
        return records, states
