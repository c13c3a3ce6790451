"""The space of all sentences as a tree of choices in which every number is one sentence, and no two are the same.

A choice of size n owns the numbers 0..n-1. Each option gets a run of them in proportion to its weight, no longer than
the number of ways to go on from there; what is left of the number, scattered evenly over those ways, is the number of
the next choice. Number -> derivation is therefore one to one *by construction*, weights hold exactly as long as there
is room for them, and neither needs a memory of what was drawn before. (A choice without room behind it, such as the
last of a sentence, is uniform.)
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, TypeVar

from stages.prompts.permutation import even_stride

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """Something that may be chosen, and what may follow."""

    value: T
    weight: int
    rest: "Choice[T]"


@dataclass(frozen=True)
class Choice(Generic[T]):
    """Options and everything behind them; without options, the end of a sentence. `start[j]` begins option j's run."""

    options: tuple[Option[T], ...] = ()
    start: tuple[int, ...] = ()
    size: int = 1
    stride: int = field(default=1, repr=False)


def choice(options: Iterable[Option[T]]) -> Choice[T]:
    """Options side by side; those that lead nowhere are left out."""
    kept = tuple(option for option in options if option.rest.size and option.weight)
    if not kept:
        return Choice(size=0)
    unit = max(1, min(option.rest.size // option.weight for option in kept))
    ends = tuple(accumulate(min(option.rest.size, option.weight * unit) for option in kept))
    return Choice(kept, (0, *ends[:-1]), ends[-1], even_stride(ends[-1]))


def chosen(root: Choice[T], number: int) -> Iterator[T]:
    """The options that belong to `number`, from the root to the end."""
    while root.options:
        number = number * root.stride % root.size
        place = bisect_right(root.start, number) - 1
        yield root.options[place].value
        number -= root.start[place]
        root = root.options[place].rest


def values(root: Choice[T]) -> set[T]:
    """Everything that can be chosen somewhere."""
    found: set[T] = set()
    seen: set[int] = set()
    todo = [root]
    while todo:
        here = todo.pop()
        if id(here) not in seen:
            seen.add(id(here))
            found |= {option.value for option in here.options}
            todo += [option.rest for option in here.options if id(option.rest) not in seen]
    return found
