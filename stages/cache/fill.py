"""Filling a cache: prompts -> records in batches -> shards, in one process or beside others in the same folder."""

import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from tqdm import tqdm

from configs.values import PictureSize
from shards.record import SPLITS, Record, tensors_of
from shards.writer import CacheWriter, shard_file
from stages.cache.claims import Claims
from stages.cache.sizes import RenderSizes
from stages.cache.writer_thread import WriterThread
from stages.prompts import Prompt, Split
from stages.system.device import one_thread
from stages.system.forecast import Forecast
from stages.system.refusal import Refused

RecordMaker: TypeAlias = Callable[[Sequence[Prompt], Sequence[str], PictureSize], list[Record]]
"""(prompts, keys, size) -> one record of this size for each."""
Failures: TypeAlias = list[tuple[str, str]]
"""(key, reason) of each prompt that gave no record."""

NOT_A_PROMPTS_FAULT = (Refused, MemoryError, torch.OutOfMemoryError)
POLL_SECONDS = 0.5
MAX_KEYS_SHOWN = 5


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made, of one size; its content depends on nothing but the recipe and its prompts."""

    split: Split
    index: int
    """its number among the shards of its split and size"""
    numbers: Sequence[int]
    """the number of each prompt in its split, rising"""
    prompts: Sequence[Prompt]
    size: PictureSize
    batch_size: int
    """prompts of one batch of the teacher"""
    named_by_size: bool = False
    """whether its cache has several sizes"""

    @property
    def name(self) -> str:
        """The name of its claim."""
        return Path(shard_file(*self.place)).stem

    @property
    def place(self) -> tuple[Split, int, PictureSize | None]:
        """Split, index, and the size where it is in the shard's name."""
        return self.split, self.index, self.size if self.named_by_size else None

    @property
    def shard(self) -> tuple[Split, int, int, PictureSize | None]:
        """Its place, with the number of its prompts, as a `CacheWriter` takes them."""
        split, index, size = self.place
        return split, index, len(self.prompts), size


@dataclass(frozen=True)
class FillJob:
    """The work that several workers share."""

    open_worker: Callable[[int], tuple[CacheWriter, RecordMaker]]
    """number of a GPU -> the cache and the teacher, opened in the worker's own process"""
    tasks: Sequence[ShardTask]
    mark: Path | None = None
    """a file that lies in the cache while the job is done"""

    def run(self, number: int) -> int:
        """Fill the cache beside other workers; returns how many shards this one made.

        Raises `Refused` where the cache's folder is another one than that of the process that gave the job.
        """
        if self.mark is not None and not self.mark.exists():
            raise Refused(
                f"{self.mark.parent.parent}: is another folder on {socket.gethostname()} than where the command runs - "
                "put the run folder on a disk that all machines see under the same path"
            )
        writer, make = self.open_worker(number)
        return fill(writer, self.tasks, make, show_progress=False)


def tasks_of(
    prompts: Mapping[Split, Sequence[Prompt]],
    records_per_shard: int,
    batch_size: int,
    sizes: RenderSizes,
    size_of: Callable[[Prompt], PictureSize] | None = None,
) -> list[ShardTask]:
    """Every shard of a cache with these prompts, split by split, size by size.

    `batch_size` is that of the native size; `size_of` chooses a listed size for a prompt, by default from its seed.
    A longer list of prompts only adds tasks, or lengthens the last of each split and size.
    """
    tasks = []
    for split, of_split in prompts.items():
        numbers: dict[PictureSize, list[int]] = {size: [] for size in sizes.listed}
        for number, prompt in enumerate(of_split):
            numbers[(size_of or sizes.size_of)(prompt)].append(number)
        for size, of_size in numbers.items():
            batch_prompts, several = sizes.batch_prompts(batch_size, size), len(sizes.listed) > 1
            for index, first in enumerate(range(0, len(of_size), records_per_shard)):
                own = of_size[first : first + records_per_shard]
                chosen = [of_split[number] for number in own]
                tasks.append(ShardTask(split, index, own, chosen, size, batch_prompts, several))
    return tasks


def tasks_in(tasks: Sequence[ShardTask], shard_range: str | None) -> Sequence[ShardTask]:
    """The tasks FIRST to END - 1 of a range `FIRST:END`; without a range, all of them."""
    if shard_range is None:
        return tasks
    match = re.fullmatch(r"(\d+):(\d+)", shard_range)
    first, end = (int(number) for number in match.groups()) if match else (0, 0)
    if not first < end <= len(tasks):
        raise Refused(
            f"shard_range = {shard_range}: should be FIRST:END with FIRST < END <= {len(tasks)} - "
            f"this cache has {len(tasks)} shards, numbered from 0 through its splits, and END is the first left out"
        )
    return tasks[first:end]


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as ranges, in the notation of `tasks_in`."""
    firsts = [number for number in numbers if number - 1 not in set(numbers)]
    ends = [number + 1 for number in numbers if number + 1 not in set(numbers)]
    return ", ".join(f"{first}:{end}" for first, end in zip(firsts, ends, strict=True))


def count_prompts(tasks: Iterable[ShardTask]) -> int:
    """Prompts of all these tasks."""
    return sum(len(task.prompts) for task in tasks)


def unfinished_tasks(writer: CacheWriter, tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """The tasks that are still to be done, judging by the sizes of the files alone."""
    return [task for task in tasks if not writer.is_finished(*task.shard)]


def missing_tasks(writer: CacheWriter, tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """The tasks that are still to be done; damaged shards are removed from the manifest.

    A shard that is intact and merely short stays listed until its longer successor is there.
    """
    missing = [task for task in tasks if not writer.is_intact(*task.shard)]
    for task in missing:
        writer.forget_damaged(*task.place)
    return missing


def refuse_surplus(writer: CacheWriter, tasks: Sequence[ShardTask]) -> None:
    """Raise `Refused` when the cache holds more prompts of a split than the tasks have."""
    for split in SPLITS:
        wanted, held = count_prompts(task for task in tasks if task.split == split), writer.prompt_count(split)
        if held > wanted:
            raise Refused(
                f"{writer.folder}: holds {held} {split} prompts, {wanted} are asked for - "
                f"ask for at least {held}, or choose another run folder"
            )


def fill(writer: CacheWriter, tasks: Sequence[ShardTask], make: RecordMaker, *, show_progress: bool = True) -> int:
    """Make every missing shard and show the progress; returns how many were made by this process.

    Other processes may fill the same folder: tasks that a living one has claimed are left to it and waited for.
    """
    waiting, made = missing_tasks(writer, tasks), 0
    total = count_prompts(tasks)
    done = total - count_prompts(waiting)
    hidden = not (show_progress and waiting)
    with (
        one_thread(),
        Claims(writer.folder) as claims,
        WriterThread() as writer_thread,
        tqdm(total=total, initial=done, unit="prompt", desc="cache", dynamic_ncols=True, disable=hidden) as progress,
    ):
        forecast = Forecast("cache", "prompts", total, progress.write if show_progress else lambda _: None, done)

        def advance(prompts: int) -> None:
            progress.update(prompts)
            forecast.progress(int(progress.n))

        while waiting:
            for task in list(waiting):
                if not claims.acquire(task.name):
                    continue
                waiting.remove(task)
                if writer.is_finished_now(*task.shard):  # by another process, meanwhile
                    claims.release(task.name)
                    progress.update(len(task.prompts))
                    continue
                failures: Failures = []
                batches = make_batches(task, make, failures, advance)
                writer_thread.write_while_made(batches, partial(write_shard, writer, claims, task, failures))
                made += 1
            writer_thread.check()
            if waiting:
                time.sleep(POLL_SECONDS)
    return made


def make_batches(
    task: ShardTask, make: RecordMaker, failures: Failures, advance: Callable[[int], None]
) -> Iterator[list[Record]]:
    """The records of one shard, batch by batch; the key is the prompt's number in its split.

    Batches are counted from the shard's first prompt, so a record is made in the same batch whenever it is made.
    """
    for start in range(0, len(task.prompts), task.batch_size):
        batch = task.prompts[start : start + task.batch_size]
        keys = [f"{number:09d}" for number in task.numbers[start : start + task.batch_size]]
        records = make_batch(make, batch, keys, task.size, failures)
        advance(len(batch))
        yield records


def make_batch(
    make: RecordMaker, batch: Sequence[Prompt], keys: Sequence[str], size: PictureSize, failures: Failures
) -> list[Record]:
    """The batch's records; if making them fails, one prompt at a time, with the reason of each failure.

    An error that is common to every prompt of a batch, or a want of memory, is no prompt's fault and is raised.
    """
    try:
        return make(batch, keys, size)
    except NOT_A_PROMPTS_FAULT:
        raise
    except Exception as error:
        batch_error = error
    records: list[Record] = []
    reasons: Failures = []
    for prompt, key in zip(batch, keys, strict=True):
        try:
            records += make([prompt], [key], size)
        except NOT_A_PROMPTS_FAULT:
            raise
        except Exception as error:
            reasons.append((key, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
    if not records and len(batch) > 1:
        raise batch_error
    failures += reasons
    return records


def write_shard(
    writer: CacheWriter, claims: Claims, task: ShardTask, failures: Failures, records: Iterable[Record]
) -> None:
    """Write a task's shard: it enters the manifest once it has its name, and only then its claim ends."""
    try:
        split, index, size = task.place
        writer.add(split, index, drop_non_finite(records, failures), failures, size)
    finally:
        print_failures(task, failures)
    claims.release(task.name)


def drop_non_finite(records: Iterable[Record], failures: Failures) -> Iterator[Record]:
    """The records whose numbers are all finite; the others become failures."""
    for record in records:
        bad = next((name for name, values in tensors_of(record).items() if not values.isfinite().all()), None)
        if bad:
            failures.append((record.key, f"{bad} is not finite"))
        else:
            yield record


def print_failures(task: ShardTask, failures: Failures) -> None:
    """Print above the progress why prompts gave no record: every reason once, with its prompts."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in failures:
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        more = f" and {len(keys) - MAX_KEYS_SHOWN} more" if len(keys) > MAX_KEYS_SHOWN else ""
        tqdm.write(f"{task.split} prompts {', '.join(keys[:MAX_KEYS_SHOWN])}{more}: no record: {reason}")
