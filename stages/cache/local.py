"""Workers on this machine: each is a process in a pool of its own, so that none of them dies with another."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from tqdm import tqdm

from stages.cache.fill import FillJob
from stages.cache.fleet import GRACE_SECONDS, Worker
from stages.system.ending import EXIT_INTERRUPTED
from stages.system.refusal import Refused
from stages.system.signals import interrupt_on, signal_handler
from stages.system.tied import suspend_tie, tie_to_parent

EXIT_SECONDS = 5.0


def start_workers(job: FillJob, count: int, method: str = "spawn") -> list[Worker]:
    """Start `count` processes that share a job; worker i takes GPU i, and they share the cores."""
    # Each would take all of them, and their threads would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with signal_handler(signal.SIG_IGN, signal.SIGINT, signal.SIGHUP):  # this process stops them
        return [_worker(job, number, method) for number in range(count)]


def _worker(job: FillJob, number: int, method: str) -> Worker:
    others = set(multiprocessing.active_children())
    # Tied before it imports anything slow; the job itself comes after that.
    pool = ProcessPoolExecutor(1, multiprocessing.get_context(method), tie_to_parent, (os.getpid(),))
    result = pool.submit(_run_worker, job, number)
    (process,) = set(multiprocessing.active_children()) - others
    pool.shutdown(wait=False)  # it ends after its only call
    return Worker(
        f"worker {number} (process {process.pid})",
        result,
        lambda by_force: process.kill() if by_force else process.terminate(),
        lambda error: _error_text(error, process),
    )


def _error_text(error: BaseException, process: BaseProcess) -> str:
    if isinstance(error, BrokenProcessPool):
        code = _exit_code(process)
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL: by a person, or by the system for want of memory)"
        return f"died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
    if isinstance(error, Refused):
        return str(error)
    return str(error.__cause__ or repr(error)).strip('"\n')  # the pool quotes the traceback


def _exit_code(process: BaseProcess) -> int:
    """The exit code of a dead process; the pool reads it too, so here it may come a moment later."""
    deadline = time.monotonic() + EXIT_SECONDS
    while (code := process.exitcode) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return code or 0


def _run_worker(job: FillJob, number: int) -> int:
    """Fill the cache beside others until all shards are made, or the parent stops it or ends.

    Without the thread the pool would wait for another call for ever.
    """
    finished = threading.Event()
    threading.Thread(target=_end_with_parent, args=[finished], name="parent", daemon=True).start()
    # tqdm's own lock is a semaphore of the system, which a process that is killed leaves behind.
    tqdm.set_lock(threading.RLock())
    try:
        with suspend_tie(), interrupt_on(signal.SIGTERM):  # signals of the terminal stay ignored
            return job.run(number)
    finally:
        finished.set()


def _end_with_parent(finished: threading.Event) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        if not finished.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # to the process, so that it wakes the main thread
        finished.wait(GRACE_SECONDS)  # to remove unfinished files
        os._exit(EXIT_INTERRUPTED)
