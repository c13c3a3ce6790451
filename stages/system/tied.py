"""A process that ends with the one that started it: `python -m stages.system.tied PID MODULE WORDS...` runs MODULE so.

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
"""The process that this one is tied to, if it is."""


def tie_to_parent(parent: int) -> None:
    """Have this process get SIGTERM when `parent` dies, and end it at once if that has happened already.

    The kernel sends the signal where it can; elsewhere a thread looks for the parent's number now and then.
    """
    by_kernel = _ask_kernel(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew of the tie
        os._exit(128 + signal.SIGTERM)
    if not by_kernel and parent not in _parents:
        threading.Thread(target=_poll_parent, args=[parent], name="tied", daemon=True).start()
    _parents[:] = [parent]


@contextmanager
def suspend_tie() -> Iterator[None]:
    """Within, this process sees for itself that its parent is gone, and finishes what it does.

    The kernel sends its signal once for each thread of the parent, and a second one may mean: at once.
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
    """Linux alone has this; it lasts through exec, and is not inherited by children."""
    if not sys.platform.startswith("linux"):
        return False
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
