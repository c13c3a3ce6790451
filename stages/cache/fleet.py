"""Several workers fill one cache: they are started, watched through its folder, and stopped together."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from configs.values import PictureSize
from shards.writer import CacheWriter, remove_leftovers
from stages.cache.claims import marked
from stages.cache.fill import FillJob, ShardTask, count_prompts, missing_tasks, unfinished_tasks
from stages.system.atomic import PARTIAL_SUFFIX
from stages.system.forecast import Forecast
from stages.system.refusal import Refused

GLANCE_SECONDS = 1.0
GRACE_SECONDS = 10.0
MAX_LOSSES = 3
"""Times that each worker may be lost without a shard being finished meanwhile, before it is not started again."""


@dataclass(frozen=True)
class Worker:
    """A process that fills a cache beside others, here or elsewhere."""

    name: str
    result: "Future[int]"
    """how many shards it made"""
    stop: Callable[[bool], None]
    """True kills it; False lets it remove its unfinished files first"""
    error_text: Callable[[BaseException], str]
    """a message of its error"""
    start_again: "Callable[[BaseException], Worker | None]" = lambda _: None
    """another in place of one that ended with this error; None where a new one would end as it did"""


def fill_by_many(
    writer: CacheWriter,
    job: FillJob,
    record_bytes: Mapping[PictureSize, int],
    start: Callable[[FillJob], Sequence[Worker]],
) -> int:
    """Have a job done by the workers that `start` starts, with their progress shown; returns how many shards were made.

    They share the work by claims: shards that a failed worker had claimed are made by the others. Raises `Refused` when
    shards are missing in the end.
    """
    missing = missing_tasks(writer, job.tasks)
    if not missing:
        return 0
    total, remaining = count_prompts(job.tasks), list(missing)
    with (
        tqdm(total=total, unit="prompt", desc="cache", dynamic_ncols=True) as progress,
        marked(writer.folder) as mark,
    ):

        def count_unfinished() -> int:
            progress.update(max(0, prompts_made(writer, job.tasks, record_bytes) - int(progress.n)))
            forecast.progress(int(progress.n))
            remaining[:] = unfinished_tasks(writer, remaining)
            return len(remaining)

        progress.update(prompts_made(writer, job.tasks, record_bytes))
        progress.unpause()
        forecast = Forecast("cache", "prompts", total, progress.write, int(progress.n))
        failed = wait_for_workers(start(replace(job, mark=mark)), count_unfinished)
    remove_leftovers(writer.folder)
    writer.rebuild_manifest()  # a worker may have died between journal and manifest
    unfinished = len(unfinished_tasks(writer, missing))
    if failed and unfinished:
        raise Refused(f"{'; '.join(failed)} - what is finished is kept, and the same command goes on from here")
    return len(missing) - unfinished


def wait_for_workers(workers: Sequence[Worker], count_unfinished: Callable[[], int]) -> list[str]:
    """Wait until no shard is unfinished, or no worker runs; returns the failed, with the last line of the reason.

    A worker that was lost, not one that failed, is started again. `count_unfinished` also shows the progress.
    """
    running, failed = {worker.result: worker for worker in workers}, list[str]()
    unfinished, losses = count_unfinished(), 0
    finished_at: float | None = None
    try:
        while running:
            done, _ = wait(running, GLANCE_SECONDS, FIRST_COMPLETED)
            before, unfinished = unfinished, count_unfinished()
            losses = losses if unfinished == before else 0
            for result in done:
                worker, error = running.pop(result), result.exception()
                if error is None:
                    continue
                reason = worker.error_text(error).strip()
                losses += 1
                may_start = unfinished and losses <= MAX_LOSSES * len(workers)
                if may_start and (again := worker.start_again(error)):
                    running[again.result] = again
                    reason += "\nit starts again, as soon as there is room for it"
                else:
                    failed.append(f"{worker.name}: {reason.splitlines()[-1]}")
                tqdm.write(f"{worker.name}: {reason}", sys.stderr)
            if not unfinished:  # one that waits for a place, or for its teacher, has nothing to do
                finished_at = finished_at or time.monotonic()
                if time.monotonic() - finished_at > GRACE_SECONDS:
                    break
    finally:
        for worker in running.values():
            worker.stop(False)
        wait(running, GRACE_SECONDS)
        for worker in running.values():  # one that has removed its files may still wait for another call
            worker.stop(True)
    return failed


def prompts_made(writer: CacheWriter, tasks: Sequence[ShardTask], record_bytes: Mapping[PictureSize, int]) -> int:
    """Prompts of these tasks in finished shards and, by their size, in begun ones, on whichever machine."""
    writer.refresh()
    begun = partial_bytes(writer.folder)
    return sum(
        len(task.prompts)
        if writer.is_finished(*task.shard)
        else min(len(task.prompts), begun.get(task.name, 0) // record_bytes[task.size])
        for task in tasks
    )


def partial_bytes(cache: Path) -> dict[str, int]:
    """Name of each task whose shard is being written -> its bytes so far."""
    sizes: dict[str, int] = {}
    for path in (cache / "data").glob(f".*{PARTIAL_SUFFIX}"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            sizes[path.name.removeprefix(".").partition(".tar.")[0]] = path.stat().st_size
    return sizes
