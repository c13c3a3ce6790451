"""The space of all sentences as a tree of choices in which every number is one sentence, and its shuffle.

A choice of size n owns the numbers 0..n-1. Each option gets a run of them in proportion to its weight, no longer than
the number of derivations behind it; the rest of the number, scattered evenly over these, is the number of the next
choice. Number -> derivation is therefore one to one *by construction*, and weights hold exactly where the options have
enough derivations behind them (the last choice of a sentence is uniform). Neither needs the earlier numbers.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from math import gcd
from typing import Generic, TypeVar

ROUNDS = 4
MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` in the permutation of 0..size-1 that belongs to `key`.

    A Feistel network over the least even number of bits, walked along its cycle until it lands below `size`
    (Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix64(key ^ mix64(right * ROUNDS + turn)) & low)
        index = left << half | right
        if index < size:
            return index


def mix64(value: int) -> int:
    """A 64-bit number that looks unrelated to `value` (splitmix64's output function)."""
    value = (value + GOLDEN) & MASK_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK_64
    return value ^ value >> 31


def even_stride(size: int) -> int:
    """A step coprime to `size` whose first n multiples lie evenly over 0..size-1 for every n (the golden ratio's)."""
    stride = max(1, size * GOLDEN >> 64)
    while gcd(stride, size) != 1:
        stride += 1
    return stride


T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """A value that may be chosen, and the choice after it."""

    value: T
    weight: int
    next_choice: "Choice[T]"


@dataclass(frozen=True)
class Choice(Generic[T]):
    """Options and all derivations behind them; none at the end of a sentence. `start[j]` begins option j's run."""

    options: tuple[Option[T], ...] = ()
    start: tuple[int, ...] = ()
    size: int = 1
    stride: int = field(default=1, repr=False)


def make_choice(options: Iterable[Option[T]]) -> Choice[T]:
    """A choice between options; those without a derivation are left out."""
    kept = tuple(option for option in options if option.next_choice.size and option.weight)
    if not kept:
        return Choice(size=0)
    unit = max(1, min(option.next_choice.size // option.weight for option in kept))
    ends = tuple(accumulate(min(option.next_choice.size, option.weight * unit) for option in kept))
    return Choice(kept, (0, *ends[:-1]), ends[-1], even_stride(ends[-1]))


def options_at(root: Choice[T], number: int) -> Iterator[T]:
    """The options that belong to `number`, from the root to the end."""
    while root.options:
        number = number * root.stride % root.size
        j = bisect_right(root.start, number) - 1
        yield root.options[j].value
        number, root = number - root.start[j], root.options[j].next_choice


def values(root: Choice[T]) -> set[T]:
    """All values of the tree."""
    reached: set[T] = set()
    visited: set[int] = set()
    pending = [root]
    while pending:
        choice = pending.pop()
        if id(choice) not in visited:
            visited.add(id(choice))
            reached |= {option.value for option in choice.options}
            pending += [option.next_choice for option in choice.options]
    return reached
