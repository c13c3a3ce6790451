"""Processes that end with their parent: `python -m stages.system.tied PID MODULE ARGUMENTS...` runs MODULE as one.

It imports nothing but the standard library, so that the tie holds before the first slow import.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5

_parents: list[int] = []
"""The pid of the process that this one is tied to, if any."""


def tie_to_parent(parent: int) -> None:
    """Send this process SIGTERM when `parent` dies, and end it at once if `parent` is dead already.

    The kernel sends the signal where it can; elsewhere a thread polls the parent's pid.
    """
    by_kernel = _ask_kernel(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the tie
        os._exit(128 + signal.SIGTERM)
    if not by_kernel and parent not in _parents:
        threading.Thread(target=_poll_parent, args=[parent], name="tied", daemon=True).start()
    _parents[:] = [parent]


@contextmanager
def suspend_tie() -> Iterator[None]:
    """No signal in this block: the process polls for its parent itself, and finishes its step.

    The kernel sends its signal once for each thread of the parent, and a second one would end the process at once.
    """
    tied, _parents[:] = list(_parents), []
    if tied:
        _ask_kernel(0)
    try:
        yield
    finally:
        if tied and os.getppid() == tied[0]:
            tie_to_parent(tied[0])


def _ask_kernel(number: int) -> bool:
    """Whether the kernel will send this signal; Linux only, kept through exec, not inherited by children."""
    try:
        return bool(ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if parent in _parents:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Tie this process to its parent, then become the module."""
    tie_to_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from stages.system import tied

    tied.main()
