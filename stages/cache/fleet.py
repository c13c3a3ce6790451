"""How full a cache is, seen from its folder alone: whoever fills it, from whichever machine.

Several workers fill one cache: they are started, watched from one place, and stopped together.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from shards.writer import CacheWriter, remove_leftovers
from stages.cache.fill import FillJob, ShardTask, missing_tasks
from stages.system.atomic import PARTIAL_SUFFIX
from stages.system.forecast import Forecast
from stages.system.refusal import Refused


def prompts_made(writer: CacheWriter, tasks: Sequence[ShardTask], record_bytes: int) -> int:
    """How many prompts of these tasks are answered for: in finished shards and, by their size, in begun ones."""
    writer.refresh()
    begun, made = partial_bytes(writer.folder), 0
    for task in tasks:
        if writer.is_finished(task.split, task.index, len(task.prompts)):
            made += len(task.prompts)
        else:
            made += min(len(task.prompts), begun.get(task.name, 0) // record_bytes)
    return made


def partial_bytes(cache: Path) -> dict[str, int]:
    """Name of each task whose shard is being written -> bytes that are there."""
    found: dict[str, int] = {}
    for path in (cache / "data").glob(f".*{PARTIAL_SUFFIX}"):
        with suppress(FileNotFoundError):  # it has got its name
            found[path.name.removeprefix(".").partition(".tar.")[0]] = path.stat().st_size
    return found


GLANCE_SECONDS = 1.0
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Worker:
    """A process that fills a cache beside others, here or elsewhere."""

    name: str
    result: "Future[int]"
    """how many shards it made"""
    stop: Callable[[bool], None]
    """asks it to stop; with True, ends it"""
    error_text: Callable[[BaseException], str]
    """its error, in words"""


def fill_by_many(
    writer: CacheWriter, job: FillJob, record_bytes: int, start: Callable[[FillJob], Sequence[Worker]]
) -> int:
    """Have a job done by the workers that `start` starts, show how far they are; returns how many shards they made.

    The claims share the work among them. One that fails is told, and what it had claimed is made by the others.
    Raises `Refused` when shards are missing in the end.
    """
    if not missing_tasks(writer, job.tasks):
        return 0
    total = sum(len(task.prompts) for task in job.tasks)
    with tqdm(total=total, unit="prompt", desc="cache", dynamic_ncols=True) as progress:

        def show() -> None:
            progress.update(max(0, prompts_made(writer, job.tasks, record_bytes) - int(progress.n)))
            forecast.progress(int(progress.n))

        progress.update(prompts_made(writer, job.tasks, record_bytes))
        progress.unpause()
        forecast = Forecast("cache", "prompts", total, progress.write, int(progress.n))
        failed, made = wait_for_workers(start(job), show)
    remove_leftovers(writer.folder)
    if failed and not all(writer.is_finished(task.split, task.index, len(task.prompts)) for task in job.tasks):
        raise Refused(f"{'; '.join(failed)} - what is finished is kept, and the same command goes on from here")
    return made


def wait_for_workers(workers: Sequence[Worker], update_progress: Callable[[], None]) -> tuple[list[str], int]:
    """Wait for every worker; returns who failed, with the last line of why, and how many shards the others made."""
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
                why = worker.error_text(error).strip()
                tqdm.write(f"{worker.name}: {why}", sys.stderr)
                failed.append(f"{worker.name}: {why.splitlines()[-1]}")
    finally:
        for worker in running.values():
            worker.stop(False)
        wait(running, GRACE_SECONDS)
        for worker in running.values():  # one that has cleared away may still wait for another call
            worker.stop(True)
    return failed, made
