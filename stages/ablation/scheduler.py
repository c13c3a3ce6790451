"""Runs the jobs of a plan, some at once, each tied to this process; what is finished is not repeated."""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

from stages.ablation.jobs import JOB_FILE, LOG_FILE, Job
from stages.system.atomic import atomic_write
from stages.system.forecast import duration
from stages.system.refusal import Refused
from stages.system.sharing import link
from stages.system.signals import STOP_SIGNALS, interrupt_on
from stages.train.runtime import tied_command

WORKER = "stages.ablation.worker"
POLL_SECONDS = 0.2
STOP_SECONDS = 60.0
"""How long an interrupted run may take for its checkpoint."""
MAX_FAILURES_IN_A_ROW = 3


class Running(Protocol):
    """A job that was started, wherever it runs."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def terminate(self) -> None:
        """Have it end with a checkpoint."""

    def wait(self, timeout: float) -> int:
        """Its exit code at its end; raises `subprocess.TimeoutExpired` after so many seconds."""

    def kill(self) -> None:
        """End it at once."""


def run_jobs(
    jobs: Sequence[Job],
    cache_run: Path,
    at_once: int,
    on_finished: Callable[[Job], None],
    start: "Callable[[Job], Running] | None" = None,
) -> None:
    """Run all jobs; `cache_run` holds the cache; `on_finished` is called after each one that succeeded.

    `start` begins one, by default in a process of one thread on this machine. Raises `Refused` at the end, or after
    three failures in a row, with what failed; an interruption ends the runs, which keep a checkpoint.
    """
    start = start or start_process
    waiting, failures, in_a_row, done, began = deque(jobs), list[str](), 0, 0, time.monotonic()
    with _children() as running, interrupt_on(*STOP_SIGNALS):
        while (waiting and in_a_row < MAX_FAILURES_IN_A_ROW) or running:
            while waiting and len(running) < at_once and in_a_row < MAX_FAILURES_IN_A_ROW:
                job = waiting.popleft()
                prepare(job, cache_run)
                running[start(job)] = job, time.monotonic()
            for one, code in [(one, one.poll()) for one in running]:
                if code is None:
                    continue
                job, since = running.pop(one)
                if code == 0:
                    done, in_a_row = done + 1, 0
                    on_finished(job)
                    left = len(waiting) + len(running)
                    seconds = (time.monotonic() - began) / done * left
                    forecast = f", about {duration(seconds)} more" if left else ""
                    took = duration(time.monotonic() - since)
                    print(f"{job.label}: done in {took} - {left} of {len(jobs)} runs left{forecast}", flush=True)
                else:
                    in_a_row += 1
                    failures.append(f"{job.label}: {_last_line(job)} - {job.home / LOG_FILE} tells more")
                    print(failures[-1], file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
    if failures:
        more = f", and {len(failures) - 1} more runs failed" if len(failures) > 1 else ""
        raise Refused(f"{failures[0]}{more}; the same command tries these again")


def prepare(job: Job, cache_run: Path) -> None:
    """Make a job's folder: its settings, and links to the cache that all runs share."""
    job.home.mkdir(parents=True, exist_ok=True)
    for name in job.linked:
        link(job.home / name, cache_run / name)
    atomic_write(job.home / JOB_FILE, job.model_dump_json(indent=1) + "\n")


def start_process(job: Job) -> "subprocess.Popen[bytes]":
    """The process of a job, which ends with this one; what it prints goes to the job's log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, *tied_command(WORKER, str(job.home / JOB_FILE))]
    log: IO[bytes]
    with open(job.home / LOG_FILE, "ab") as log:
        # A session of its own: a key in the terminal reaches this process alone, which ends the others once.
        return subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


@contextmanager
def _children() -> Iterator[dict[Running, tuple[Job, float]]]:
    """What runs, and since when; what still runs at the end is terminated, and killed where that does not suffice."""
    running: dict[Running, tuple[Job, float]] = {}
    with ExitStack() as stack:
        stack.callback(_end_all, running)
        yield running


def _end_all(running: dict[Running, tuple[Job, float]]) -> None:
    for one in running:
        one.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for one in running:
        try:
            one.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()


def _last_line(job: Job) -> str:
    """What a failed run said last."""
    try:
        lines = (job.home / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "failed"
    text = next((line.strip() for line in reversed(lines) if line.strip()), "failed")
    return text.removeprefix("sollune: ")[:300]
