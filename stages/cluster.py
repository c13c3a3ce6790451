"""Filling a cache: the work is cut into shards, each a task of its own whose content depends on nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Never, TypeAlias

import torch
from tqdm import tqdm

from shards.record import Record
from shards.writer import CacheWriter
from stages.prompts import Prompt, Split

Make: TypeAlias = Callable[[Sequence[Prompt], Sequence[str]], list[Record]]
"""(prompts, keys) -> one record each."""


@dataclass(frozen=True)
class Task:
    """One shard to be made."""

    split: Split
    index: int
    first: int
    prompts: Sequence[Prompt]


def tasks_of(prompts: Mapping[Split, Sequence[Prompt]], records_per_shard: int) -> list[Task]:
    """Every shard of a cache with these prompts; a longer list of prompts only adds tasks or lengthens the last."""
    return [
        Task(split, first // records_per_shard, first, listed[first : first + records_per_shard])
        for split, listed in prompts.items()
        for first in range(0, len(listed), records_per_shard)
    ]


def fill(writer: CacheWriter, tasks: Sequence[Task], batch_size: int, make: Make) -> int:
    """Make every shard that is missing, in order, and show how far it is; returns how many were made."""
    missing = [task for task in tasks if not writer.has(task.split, task.index, len(task.prompts))]
    total = sum(len(task.prompts) for task in tasks)
    done = total - sum(len(task.prompts) for task in missing)
    with tqdm(total=total, initial=done, unit="prompt", desc="cache", dynamic_ncols=True) as progress:
        for task in missing:
            writer.add(task.split, task.index, records_of(task, batch_size, make, progress))
    return len(missing)


def records_of(task: Task, batch_size: int, make: Make, progress: "tqdm[Never]") -> Iterator[Record]:
    """The records of one task, a batch of prompts at a time; the key is the prompt's number in its split."""
    for first in range(0, len(task.prompts), batch_size):
        batch = task.prompts[first : first + batch_size]
        yield from make(batch, [f"{task.first + first + i:09d}" for i in range(len(batch))])
        progress.update(len(batch))


def device_of(name: str) -> torch.device:
    """`auto` is the first GPU, or else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
