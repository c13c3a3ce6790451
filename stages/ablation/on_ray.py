"""Jobs of a study on a Ray cluster: each is a task; all nodes see the folders of the study under the same paths."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

from stages.ablation.jobs import JOB_FILE, LOG_FILE, Job, read_job
from stages.ablation.scheduler import POLL_SECONDS, STOP_SECONDS, Running, start_process
from stages.cache.engines import refuse_ray_without_library
from stages.cache.on_ray import connect, error_text
from stages.system.ownership import LAUNCH_VARIABLE, refuse_claimed
from stages.system.refusal import Refused
from stages.system.signals import signal_handler

MAX_LOSSES = 3
"""Times that a job is started again after its node was lost; it goes on from its last checkpoint."""
FAILED, REASON_CHARACTERS = 1, 300


def ray_starter(cluster: str) -> Callable[[Job], Running]:
    """A function that starts jobs on `ray` or `ray:ADDRESS`; raises `Refused` where that cannot be reached."""
    refuse_ray_without_library(cluster)
    connect(cluster.partition(":")[2] or None)
    import ray  # an optional dependency

    gpus = int("GPU" in ray.cluster_resources())
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(run_on_node)
    return lambda job: RayJob(ray, remote, job)


class RayJob:
    """A job that runs as a task, and is started again elsewhere where its node is lost."""

    def __init__(self, ray: Any, remote: Any, job: Job) -> None:
        """Start it; `remote` is `run_on_node` as Ray's function."""
        self._ray, self._remote, self._job = ray, remote, job
        self._losses = 0
        self._code: int | None = None
        self._start()

    def _start(self) -> None:
        self._task = self._remote.remote(str(Path.cwd()), str(self._job.home / JOB_FILE))
        self._result: Future[int] = self._task.future()

    def poll(self) -> int | None:
        """Its exit code; None while it runs, waits for a free processor, or starts again."""
        if self._code is None and self._result.done():
            self._code = self._end()
        return self._code

    def _end(self) -> int | None:
        """The exit code of a task that has ended; None where another takes its place."""
        error = self._result.exception()
        if error is None:
            return self._result.result()
        errors = self._ray.exceptions
        lost = isinstance(error, errors.WorkerCrashedError | errors.NodeDiedError | errors.OutOfMemoryError)
        again = lost and self._losses < MAX_LOSSES
        reason = error_text(error).strip().splitlines()[-1][:REASON_CHARACTERS]
        print(f"{self._job.label}: {reason}" + ("; started again" if again else ""), file=sys.stderr, flush=True)
        with open(self._job.home / LOG_FILE, "a", encoding="utf-8") as log:  # its last line says why a job failed
            log.write(f"{reason}\n")
        if not again:
            return FAILED
        self._losses += 1
        self._start()
        return None

    def terminate(self) -> None:
        """Have it end with a checkpoint."""
        self._ray.cancel(self._task, force=False)

    def wait(self, timeout: float) -> int:
        """Its exit code once it has ended; raises `subprocess.TimeoutExpired` after so many seconds."""
        try:
            error = self._result.exception(timeout)
        except NotYet as late:
            raise subprocess.TimeoutExpired(self._job.label, timeout) from late
        return FAILED if error is not None else self._result.result()

    def kill(self) -> None:
        """End it at once."""
        self._ray.cancel(self._task, force=True)


def run_on_node(folder: str, file: str) -> int:
    """Run the job of this file in a process of its own, started in `folder`, and return its exit code.

    The process ends with this one. A cancelled task, and a node that is drained (SIGTERM), end it with a checkpoint.
    Raises `Refused` where this node does not see the study's folders.
    """
    drained = False

    def drain(_number: int, _frame: object) -> None:
        nonlocal drained
        drained = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    job = open_job(folder, file)
    with signal_handler(drain, signal.SIGTERM):
        try:
            wait_for_end(job)
            process = start_process(job)
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        except KeyboardInterrupt:
            if drained:  # the driver sees a lost worker, and starts the job elsewhere
                os._exit(128 + signal.SIGTERM)
            raise


def open_job(folder: str, file: str) -> Job:
    """The job of a file, with `folder` as the working folder; paths of the job may be relative to it.

    Raises `Refused` where this node does not see them.
    """
    try:
        os.chdir(folder)
        job = read_job(Path(file))
    except OSError as error:
        raise Refused(
            f"{error.filename}: {error.strerror} on {socket.gethostname()} - all nodes have to see --run, --out and "
            "the folder in which the command was started, under the same paths"
        ) from error
    # The study has its folder to itself, and starts a job again after Ray has lost it: a claim of before is void.
    os.environ[LAUNCH_VARIABLE] = f"ablate {job.references.parent.absolute()}"
    return job


def wait_for_end(job: Job) -> None:
    """Wait for a process of before on this node, which may write its checkpoint after Ray has lost its worker."""
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            refuse_claimed(job.run_folder, "train in")
            break
        except Refused:
            time.sleep(POLL_SECONDS)
