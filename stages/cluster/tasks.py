"""The work, cut into shards: tasks whose content depends on nothing but the recipe and their prompts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from configs.refusal import Refused
from shards.writer import CacheWriter
from stages.cluster.records import Make
from stages.prompts import Prompt, Split


@dataclass(frozen=True)
class Task:
    """One shard to be made."""

    split: Split
    index: int
    first: int
    prompts: Sequence[Prompt]

    @property
    def name(self) -> str:
        """What it is claimed by."""
        return f"{self.split}-{self.index:06d}"


@dataclass(frozen=True)
class Job:
    """What each of several workers is told."""

    open: Callable[[int], tuple[CacheWriter, Make]]
    """number of a GPU -> the cache and the teacher, opened in the worker's own process"""
    tasks: Sequence[Task]
    batch_size: int


def tasks_of(prompts: Mapping[Split, Sequence[Prompt]], records_per_shard: int) -> list[Task]:
    """Every shard of a cache with these prompts; a longer list of prompts only adds tasks or lengthens the last."""
    return [
        Task(split, first // records_per_shard, first, listed[first : first + records_per_shard])
        for split, listed in prompts.items()
        for first in range(0, len(listed), records_per_shard)
    ]


def tasks_in(tasks: Sequence[Task], shard_range: str | None) -> Sequence[Task]:
    """The tasks FIRST to END - 1 of the list that `FIRST:END` asks for; all of them when nothing is asked."""
    if shard_range is None:
        return tasks
    said = re.fullmatch(r"(\d+):(\d+)", shard_range)
    first, end = (int(number) for number in said.groups()) if said else (0, 0)
    if not first < end <= len(tasks):
        raise Refused(
            f"shard_range = {shard_range}: should be FIRST:END with FIRST < END <= {len(tasks)} - "
            f"this cache has {len(tasks)} shards, numbered from 0 through its splits, and END is the first left out"
        )
    return tasks[first:end]


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as ranges, the way `tasks_in` reads them."""
    firsts = [number for number in numbers if number - 1 not in set(numbers)]
    ends = [number + 1 for number in numbers if number + 1 not in set(numbers)]
    return ", ".join(f"{first}:{end}" for first, end in zip(firsts, ends, strict=True))
