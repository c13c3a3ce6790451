"""Filling a cache: the work is cut into shards, each a task of its own whose content depends on nothing else."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Never, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from configs.refusal import Refused
from shards.claims import Claims
from shards.record import SPLITS, Record
from shards.writer import CacheWriter
from stages.prompts import Prompt, Split

POLL_SECONDS = 0.5

Make: TypeAlias = Callable[[Sequence[Prompt], Sequence[str]], list[Record]]
"""(prompts, keys) -> one record each."""


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


def tasks_of(prompts: Mapping[Split, Sequence[Prompt]], records_per_shard: int) -> list[Task]:
    """Every shard of a cache with these prompts; a longer list of prompts only adds tasks or lengthens the last."""
    return [
        Task(split, first // records_per_shard, first, listed[first : first + records_per_shard])
        for split, listed in prompts.items()
        for first in range(0, len(listed), records_per_shard)
    ]


def fill(writer: CacheWriter, tasks: Sequence[Task], batch_size: int, make: Make) -> int:
    """Make every shard that is missing, and show how far it is; returns how many were made here.

    Other processes may fill the same folder: what a living one has claimed is left to it, and waited for.
    Raises `Refused` when the cache holds more prompts than the tasks ask for.
    """
    refuse_surplus(writer, tasks)
    waiting = [task for task in tasks if not writer.has(task.split, task.index, len(task.prompts))]
    total, made = sum(len(task.prompts) for task in tasks), 0
    done = total - sum(len(task.prompts) for task in waiting)
    for task in waiting:
        writer.forget(task.split, task.index)
    with (
        Claims(writer.folder) as claims,
        tqdm(total=total, initial=done, unit="prompt", desc="cache", dynamic_ncols=True) as progress,
    ):
        while waiting:
            for task in list(waiting):
                if not claims.take(task.name):
                    continue
                writer.refresh()
                if not writer.finished(task.split, task.index, len(task.prompts)):
                    failures: list[tuple[str, str]] = []
                    writer.add(task.split, task.index, records_of(task, batch_size, make, failures, progress), failures)
                    made += 1
                claims.release(task.name)
                waiting.remove(task)
            if waiting:
                time.sleep(POLL_SECONDS)
    return made


def refuse_surplus(writer: CacheWriter, tasks: Sequence[Task]) -> None:
    """Raise `Refused` when the cache answers for more prompts of a split than are asked for."""
    for split in SPLITS:
        asked, held = sum(len(task.prompts) for task in tasks if task.split == split), writer.prompts(split)
        if held > asked:
            raise Refused(
                f"{writer.folder}: holds {held} {split} prompts, {asked} are asked for - "
                f"ask for at least {held}, or choose another run folder (RUN=)"
            )


def records_of(
    task: Task, batch_size: int, make: Make, failures: list[tuple[str, str]], progress: "tqdm[Never]"
) -> Iterator[Record]:
    """The records of one task, a batch of prompts at a time; the key is the prompt's number in its split."""
    for first in range(0, len(task.prompts), batch_size):
        batch = task.prompts[first : first + batch_size]
        for record in attempt(make, batch, [f"{task.first + first + i:09d}" for i in range(len(batch))], failures):
            bad = next((name for name, values in tensors_of(record) if not values.isfinite().all()), None)
            if bad:
                failures.append((record.key, f"{bad} is not finite"))
            else:
                yield record
        progress.update(len(batch))


def attempt(
    make: Make, batch: Sequence[Prompt], keys: Sequence[str], failures: list[tuple[str, str]]
) -> Iterator[Record]:
    """The batch's records; when it cannot be made, one prompt at a time, and the reason of each that fails.

    What fails for every prompt of a batch, or for want of memory, is no prompt's fault and is raised.
    """
    try:
        yield from make(batch, keys)
        return
    except (Refused, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        whole = error
    found: list[Record] = []
    reasons: list[tuple[str, str]] = []
    for prompt, key in zip(batch, keys, strict=True):
        try:
            found += make([prompt], [key])
        except (Refused, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reasons.append((key, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    if not found:
        raise whole
    failures += reasons
    yield from found


def tensors_of(record: Record) -> Iterator[tuple[str, Tensor]]:
    """The record's numbers by name."""
    yield from ((name, getattr(record, name)) for name in ("cond", "x0"))
    yield from ((name, getattr(record.draws, name)) for name in ("s", "x_t", "v_cond", "v_uncond"))
    yield from ((f"features.{block}", values) for block, values in record.features.by_block.items())


def device_of(name: str) -> torch.device:
    """`auto` is the first GPU, or else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
