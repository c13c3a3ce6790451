"""Workers on a Ray cluster: each is one long task, and all of them see the run folder under the same path.

Ray's own retries are not used: they know nothing of the shards, and would start a task for ever that dies each time.
"""

import os
import signal
import socket
from types import FrameType
from typing import Any

from stages.cache.fill import FillJob
from stages.cache.fleet import Worker
from stages.system.refusal import Refused, in_one_line
from stages.system.signals import signal_handler

ANSWER_SECONDS = 10.0
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that is started here; records go to the disk, and a worker sends back a number."""


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine; it is left when the process ends.

    Without effect in a process that has joined one. Raises `Refused` when there is no cluster.
    """
    if address:
        refuse_silent(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send statistics over the network
    import ray  # an optional dependency

    if ray.is_initialized():
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address or "local",
            log_to_driver=False,
            logging_level="error",
            include_dashboard=False,
            object_store_memory=None if address else OBJECT_STORE_BYTES,
        )
    except (OSError, ValueError, RuntimeError, AssertionError, ray.exceptions.RayError) as error:
        where = f"ray:{address}" if address else "ray"
        reason = in_one_line(error)[:200]
        raise Refused(f"cluster = {where}: {reason} - name a running cluster, or plain ray") from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in the place of the command's


def refuse_silent(address: str) -> None:
    """Raise `Refused` when nothing answers at HOST:PORT; Ray itself tries for minutes. Other addresses pass."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise Refused(
            f"cluster = ray:{address}: nothing answers there ({in_one_line(error)}) - name a running cluster, "
            "as `ray start --head` printed it, or plain ray"
        ) from error


def start_workers(job: FillJob, count: int) -> list[Worker]:
    """Start `count` tasks that share a job, on the cluster that was joined."""
    import ray

    gpus = int("GPU" in ray.cluster_resources())
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(run_worker)
    return [_start_worker(ray, f"ray worker {number}", remote, job) for number in range(count)]


def _start_worker(ray: Any, name: str, remote: Any, job: FillJob) -> Worker:
    task = remote.remote(job)
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    return Worker(
        name,
        task.future(),
        lambda by_force: ray.cancel(task, force=by_force),
        error_text,
        lambda error: _start_worker(ray, name, remote, job) if isinstance(error, lost) else None,
    )


def error_text(error: BaseException) -> str:
    """A message of an error of a task: its refusal, its traceback, or Ray's sentence without the advice after it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Refused):
        return str(cause)
    text = str(error)
    return text if "\n" in text.strip() else text.partition(". ")[0]  # a traceback, or a sentence with advice after it


def run_worker(job: FillJob) -> int:
    """Fill the cache beside others; Ray shows each task its own GPU as number 0.

    A node that is drained sends SIGTERM: the unfinished shard is given back, and the process ends.
    """
    drained = False

    def drain(_number: int, _frame: FrameType | None) -> None:
        nonlocal drained
        drained = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    with signal_handler(drain, signal.SIGTERM):
        try:
            return job.run(0)
        except KeyboardInterrupt:
            if drained:  # the driver sees a lost worker, and starts another elsewhere
                os._exit(128 + signal.SIGTERM)
            raise
