"""How a job is stopped: SIGTERM and SIGHUP are met like Ctrl-C, so that what is half-written is cleared away."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from configs.hangup import is_ignored, leave_dead_terminal

INTERRUPTED = 130


@contextmanager
def stopping(*numbers: signal.Signals) -> Iterator[None]:
    """The first of these signals raises `KeyboardInterrupt`; another one ends the process at once.

    SIGHUP stays ignored where it was, as under `nohup`.

    Python hands signals to the main thread only; in another one this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(INTERRUPTED)  # a cache bears it, as it bears kill -9
        asked = True
        leave_dead_terminal()
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, stop) for number in numbers if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def deaf_to_the_terminal() -> Iterator[None]:
    """Processes started in here ignore the terminal's Ctrl-C and its end: who started them says when they stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
