"""Several workers fill one cache: they are started, watched from one place, and stopped together."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from tqdm import tqdm

from configs.refusal import Refused
from shards.writer import CacheWriter, sweep
from stages.cluster.fill import missing
from stages.cluster.gauge import prompts_made
from stages.cluster.tasks import Job
from stages.forecast import Forecast

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
    why: Callable[[BaseException], str]
    """its error, in words"""


def fill_by_many(writer: CacheWriter, job: Job, record_bytes: int, start: Callable[[Job], Sequence[Worker]]) -> int:
    """Have a job done by the workers that `start` starts, show how far they are; returns how many shards they made.

    The claims share the work among them. One that fails is told, and what it had claimed is made by the others.
    Raises `Refused` when shards are missing in the end.
    """
    if not missing(writer, job.tasks):
        return 0
    total = sum(len(task.prompts) for task in job.tasks)
    with tqdm(total=total, unit="prompt", desc="cache", dynamic_ncols=True) as progress:

        def show() -> None:
            progress.update(max(0, prompts_made(writer, job.tasks, record_bytes) - int(progress.n)))
            forecast.progress(int(progress.n))

        progress.update(prompts_made(writer, job.tasks, record_bytes))
        progress.unpause()
        forecast = Forecast("cache", "prompts", total, progress.write, int(progress.n))
        failed, made = oversee(start(job), show)
    sweep(writer.folder)
    if failed and not all(writer.finished(task.split, task.index, len(task.prompts)) for task in job.tasks):
        raise Refused(f"{'; '.join(failed)} - what is finished is kept, and the same command goes on from here")
    return made


def oversee(crew: Sequence[Worker], show: Callable[[], None]) -> tuple[list[str], int]:
    """Wait for every worker; returns who failed, with the last line of why, and how many shards the others made."""
    running, failed, made = {worker.result: worker for worker in crew}, list[str](), 0
    try:
        while running:
            done, _ = wait(running, GLANCE_SECONDS, FIRST_COMPLETED)
            show()
            for result in done:
                worker, error = running.pop(result), result.exception()
                if error is None:
                    made += result.result()
                    continue
                why = worker.why(error).strip()
                tqdm.write(f"{worker.name}: {why}", sys.stderr)
                failed.append(f"{worker.name}: {why.splitlines()[-1]}")
    finally:
        for worker in running.values():
            worker.stop(False)
        wait(running, GRACE_SECONDS)
        for worker in running.values():  # one that has cleared away may still wait for another call
            worker.stop(True)
    return failed, made
