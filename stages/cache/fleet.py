"""Several workers fill one cache: they are started, watched through its folder, and stopped together."""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from configs.values import PictureSize
from shards.writer import CacheWriter, remove_leftovers
from stages.cache.fill import FillJob, ShardTask, count_prompts, missing_tasks, unfinished_tasks
from stages.system.atomic import PARTIAL_SUFFIX
from stages.system.forecast import Forecast
from stages.system.refusal import Refused

GLANCE_SECONDS = 1.0
GRACE_SECONDS = 10.0


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


def fill_by_many(
    writer: CacheWriter,
    job: FillJob,
    record_bytes: Mapping[PictureSize, int],
    start: Callable[[FillJob], Sequence[Worker]],
) -> int:
    """Have a job done by the workers that `start` starts, with their progress shown; returns how many shards they made.

    They share the work by claims: shards that a failed worker had claimed are made by the others. Raises `Refused` when
    shards are missing in the end.
    """
    if not missing_tasks(writer, job.tasks):
        return 0
    total = count_prompts(job.tasks)
    with tqdm(total=total, unit="prompt", desc="cache", dynamic_ncols=True) as progress:

        def update() -> None:
            progress.update(max(0, prompts_made(writer, job.tasks, record_bytes) - int(progress.n)))
            forecast.progress(int(progress.n))

        progress.update(prompts_made(writer, job.tasks, record_bytes))
        progress.unpause()
        forecast = Forecast("cache", "prompts", total, progress.write, int(progress.n))
        failed, made = wait_for_workers(start(job), update)
    remove_leftovers(writer.folder)
    if failed and unfinished_tasks(writer, job.tasks):
        raise Refused(f"{'; '.join(failed)} - what is finished is kept, and the same command goes on from here")
    return made


def wait_for_workers(workers: Sequence[Worker], update_progress: Callable[[], None]) -> tuple[list[str], int]:
    """Wait for every worker; returns the failed, with the last line of the reason, and the number of shards made."""
    running, failed, made = {worker.result: worker for worker in workers}, list[str](), 0
    try:
        while running:
            done, _ = wait(running, GLANCE_SECONDS, FIRST_COMPLETED)
            update_progress()
            for result in done:
                worker, error = running.pop(result), result.exception()
                if error is None:
                    made += result.result()
                    continue
                reason = worker.error_text(error).strip()
                tqdm.write(f"{worker.name}: {reason}", sys.stderr)
                failed.append(f"{worker.name}: {reason.splitlines()[-1]}")
    finally:
        for worker in running.values():
            worker.stop(False)
        wait(running, GRACE_SECONDS)
        for worker in running.values():  # one that has removed its files may still wait for another call
            worker.stop(True)
    return failed, made


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
