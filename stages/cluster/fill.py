"""One process fills a cache, alone or beside others that do the same."""

import time
from collections.abc import Iterator, Sequence
from typing import Never

from tqdm import tqdm

from configs.refusal import Refused
from shards.claims import Claims
from shards.record import SPLITS, Record
from shards.writer import CacheWriter
from stages.cluster.records import Make, Reasons, batches_of, finite
from stages.cluster.scribe import Scribe, Write
from stages.cluster.tasks import Task
from stages.forecast import Forecast
from stages.threads import one_thread

POLL_SECONDS = 0.5
MOST_SHOWN = 5


def fill(writer: CacheWriter, tasks: Sequence[Task], batch_size: int, make: Make, *, shown: bool = True) -> int:
    """Make every shard that is missing, and show how far it is; returns how many were made here.

    Other processes may fill the same folder: what a living one has claimed is left to it, and waited for.
    """
    waiting, made = missing(writer, tasks), 0
    total = sum(len(task.prompts) for task in tasks)
    done = total - sum(len(task.prompts) for task in waiting)
    with (
        one_thread(),
        Claims(writer.folder) as claims,
        Scribe() as scribe,
        tqdm(
            total=total, initial=done, unit="prompt", desc="cache", dynamic_ncols=True, disable=not (shown and waiting)
        ) as progress,
    ):
        forecast = Forecast("cache", "prompts", total, progress.write if shown else lambda _: None, done)
        while waiting:
            for task in list(waiting):
                if not claims.take(task.name):
                    continue
                waiting.remove(task)
                if writer.answered(task.split, task.index, len(task.prompts)):  # by another process, meanwhile
                    claims.release(task.name)
                    progress.update(len(task.prompts))
                    continue
                failures: Reasons = []
                batches = batches_of(task.first, task.prompts, batch_size, make, failures)
                shown_batches = counted(batches, task, batch_size, progress, forecast)
                scribe.follow(shown_batches, entering(writer, claims, task, failures))
                made += 1
            scribe.check()
            if waiting:
                time.sleep(POLL_SECONDS)
    return made


def missing(writer: CacheWriter, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that are still to be done; what is damaged is struck off the manifest.

    A shard that is sound and merely short stays listed until its longer successor is there.
    """
    waiting = [task for task in tasks if not writer.has(task.split, task.index, len(task.prompts))]
    for task in waiting:
        writer.forget_damaged(task.split, task.index)
    return waiting


def refuse_surplus(writer: CacheWriter, tasks: Sequence[Task]) -> None:
    """Raise `Refused` when the cache answers for more prompts of a split than are asked for."""
    for split in SPLITS:
        asked, held = sum(len(task.prompts) for task in tasks if task.split == split), writer.prompts(split)
        if held > asked:
            raise Refused(
                f"{writer.folder}: holds {held} {split} prompts, {asked} are asked for - "
                f"ask for at least {held}, or choose another run folder (RUN=)"
            )


def counted(
    batches: Iterator[list[Record]], task: Task, batch_size: int, progress: "tqdm[Never]", forecast: Forecast
) -> Iterator[list[Record]]:
    """The batches, each shown as progress once it is made."""
    for number, batch in enumerate(batches):
        progress.update(min(batch_size, len(task.prompts) - number * batch_size))
        forecast.progress(int(progress.n))
        yield batch


def tell(task: Task, failures: Reasons) -> None:
    """Print why prompts gave no record, above the progress: every reason once, with the prompts that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in failures:
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        shown = ", ".join(keys[:MOST_SHOWN]) + (f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else "")
        tqdm.write(f"{task.split} prompts {shown}: no record: {reason}")


def entering(writer: CacheWriter, claims: Claims, task: Task, failures: Reasons) -> Write:
    """How the task's shard is written: it enters the manifest once it has its name, and only then its claim ends."""

    def write(records: Iterator[Record]) -> None:
        try:
            writer.add(task.split, task.index, finite(records, failures), failures)
        finally:
            tell(task, failures)
        claims.release(task.name)

    return write
