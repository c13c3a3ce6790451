"""Prompts -> records, a batch at a time; what cannot be made is told with its reason.

The work, cut into shards: tasks whose content depends on nothing but the recipe and their prompts.

One process fills a cache, alone or beside others that do the same.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Never, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from shards.record import SPLITS, Record
from shards.writer import CacheWriter
from stages.cache.claims import Claims
from stages.cache.writer_thread import Write, WriterThread
from stages.prompts import Prompt, Split
from stages.system.device import one_thread
from stages.system.forecast import Forecast
from stages.system.refusal import Refused

RecordMaker: TypeAlias = Callable[[Sequence[Prompt], Sequence[str]], list[Record]]
"""(prompts, keys) -> one record each."""

Failures: TypeAlias = list[tuple[str, str]]
"""(key, why) of each prompt that gave no record."""


def batches_of(
    first: int, prompts: Sequence[Prompt], batch_size: int, make: RecordMaker, failures: Failures
) -> Iterator[list[Record]]:
    """The records of one shard, batch by batch; the key is the prompt's number in its split.

    Batches are counted from the shard's first prompt, so a record is asked in the same company whenever it is made.
    """
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        yield attempt(make, batch, [f"{first + at + i:09d}" for i in range(len(batch))], failures)


def attempt(make: RecordMaker, batch: Sequence[Prompt], keys: Sequence[str], failures: Failures) -> list[Record]:
    """The batch's records; when it cannot be made, one prompt at a time, and the reason of each that fails.

    What fails for every prompt of a batch of several, or for want of memory, is no prompt's fault and is raised.
    """
    try:
        return make(batch, keys)
    except (Refused, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        whole = error
    found: list[Record] = []
    reasons: Failures = []
    for prompt, key in zip(batch, keys, strict=True):
        try:
            found += make([prompt], [key])
        except (Refused, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reasons.append((key, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    if not found and len(batch) > 1:
        raise whole
    failures += reasons
    return found


def drop_non_finite(records: Iterable[Record], failures: Failures) -> Iterator[Record]:
    """The records without those that hold a number which is none."""
    for record in records:
        bad = next((name for name, values in tensors_of(record) if not values.isfinite().all()), None)
        if bad:
            failures.append((record.key, f"{bad} is not finite"))
        else:
            yield record


def tensors_of(record: Record) -> Iterator[tuple[str, Tensor]]:
    """The record's numbers by name."""
    yield from ((name, getattr(record, name)) for name in ("cond", "x0"))
    yield from ((name, getattr(record.states, name)) for name in ("s", "x_t", "v_cond", "v_uncond"))
    yield from ((f"features.{block}", values) for block, values in record.features.by_block.items())


@dataclass(frozen=True)
class ShardTask:
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
class FillJob:
    """What each of several workers is told."""

    open_worker: Callable[[int], tuple[CacheWriter, RecordMaker]]
    """number of a GPU -> the cache and the teacher, opened in the worker's own process"""
    tasks: Sequence[ShardTask]
    batch_size: int


def tasks_of(prompts: Mapping[Split, Sequence[Prompt]], records_per_shard: int) -> list[ShardTask]:
    """Every shard of a cache with these prompts; a longer list of prompts only adds tasks or lengthens the last."""
    return [
        ShardTask(split, first // records_per_shard, first, listed[first : first + records_per_shard])
        for split, listed in prompts.items()
        for first in range(0, len(listed), records_per_shard)
    ]


def tasks_in(tasks: Sequence[ShardTask], shard_range: str | None) -> Sequence[ShardTask]:
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


POLL_SECONDS = 0.5
MOST_SHOWN = 5


def fill(
    writer: CacheWriter, tasks: Sequence[ShardTask], batch_size: int, make: RecordMaker, *, show_progress: bool = True
) -> int:
    """Make every shard that is missing, and show how far it is; returns how many were made here.

    Other processes may fill the same folder: what a living one has claimed is left to it, and waited for.
    """
    waiting, made = missing_tasks(writer, tasks), 0
    total = sum(len(task.prompts) for task in tasks)
    done = total - sum(len(task.prompts) for task in waiting)
    with (
        one_thread(),
        Claims(writer.folder) as claims,
        WriterThread() as scribe,
        tqdm(
            total=total,
            initial=done,
            unit="prompt",
            desc="cache",
            dynamic_ncols=True,
            disable=not (show_progress and waiting),
        ) as progress,
    ):
        forecast = Forecast("cache", "prompts", total, progress.write if show_progress else lambda _: None, done)
        while waiting:
            for task in list(waiting):
                if not claims.acquire(task.name):
                    continue
                waiting.remove(task)
                if writer.is_finished_now(task.split, task.index, len(task.prompts)):  # by another process, meanwhile
                    claims.release(task.name)
                    progress.update(len(task.prompts))
                    continue
                failures: Failures = []
                batches = batches_of(task.first, task.prompts, batch_size, make, failures)
                shown_batches = track_progress(batches, task, batch_size, progress, forecast)
                scribe.write_while_made(shown_batches, shard_write(writer, claims, task, failures))
                made += 1
            scribe.check()
            if waiting:
                time.sleep(POLL_SECONDS)
    return made


def missing_tasks(writer: CacheWriter, tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """The tasks that are still to be done; what is damaged is struck off the manifest.

    A shard that is sound and merely short stays listed until its longer successor is there.
    """
    waiting = [task for task in tasks if not writer.is_intact(task.split, task.index, len(task.prompts))]
    for task in waiting:
        writer.forget_damaged(task.split, task.index)
    return waiting


def refuse_surplus(writer: CacheWriter, tasks: Sequence[ShardTask]) -> None:
    """Raise `Refused` when the cache answers for more prompts of a split than are asked for."""
    for split in SPLITS:
        asked, held = sum(len(task.prompts) for task in tasks if task.split == split), writer.prompt_count(split)
        if held > asked:
            raise Refused(
                f"{writer.folder}: holds {held} {split} prompts, {asked} are asked for - "
                f"ask for at least {held}, or choose another run folder (RUN=)"
            )


def track_progress(
    batches: Iterator[list[Record]], task: ShardTask, batch_size: int, progress: "tqdm[Never]", forecast: Forecast
) -> Iterator[list[Record]]:
    """The batches, each shown as progress once it is made."""
    for number, batch in enumerate(batches):
        progress.update(min(batch_size, len(task.prompts) - number * batch_size))
        forecast.progress(int(progress.n))
        yield batch


def print_failures(task: ShardTask, failures: Failures) -> None:
    """Print why prompts gave no record, above the progress: every reason once, with the prompts that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in failures:
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        shown = ", ".join(keys[:MOST_SHOWN]) + (f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else "")
        tqdm.write(f"{task.split} prompts {shown}: no record: {reason}")


def shard_write(writer: CacheWriter, claims: Claims, task: ShardTask, failures: Failures) -> Write:
    """How the task's shard is written: it enters the manifest once it has its name, and only then its claim ends."""

    def write(records: Iterator[Record]) -> None:
        try:
            writer.add(task.split, task.index, drop_non_finite(records, failures), failures)
        finally:
            print_failures(task, failures)
        claims.release(task.name)

    return write
