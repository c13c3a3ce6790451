"""SIGHUP, which a closed terminal sends: ignored under `nohup`, and else the end of whatever can be printed.

How a job is stopped: SIGTERM and SIGHUP are met like Ctrl-C, so that what is half-written is cleared away.

A polite end: the first of these signals asks the loop to finish its step, the second ends the program at once.

A closed terminal sends SIGHUP, and then nothing can be printed any more: what was the terminal becomes nothing.
"""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType

from stages.system.tied import suspend_tie


def is_ignored(number: signal.Signals) -> bool:
    """Whether SIGHUP is ignored, as under `nohup`: then it stays so."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def detach_dead_terminal() -> None:
    """Let output and errors go nowhere where they went to a terminal that is no more, instead of ending the program."""
    for handle in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(handle).st_mode) and not os.isatty(handle):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)


INTERRUPTED = 130


@contextmanager
def interrupt_on(*numbers: signal.Signals) -> Iterator[None]:
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
        detach_dead_terminal()
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, stop) for number in numbers if not is_ignored(number)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def ignore_terminal_signals() -> Iterator[None]:
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


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interruption:
    """Whether a signal asked this run to stop; a context that gives the signals back at its end."""

    def __init__(self, prints_notice: bool = True) -> None:
        """Of several processes that get the same signal, one speaks."""
        self._prints_notice = prints_notice
        self.signal: signal.Signals | None = None
        self._launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._previous_handlers: dict[signal.Signals, object] = {}
        self._tie_release = ExitStack()

    @property
    def signal_number(self) -> int:
        """The signal's number, 0 when there was none; the launcher's death is a SIGTERM to those whom it started."""
        if self.signal is None and self._launcher_pid not in (None, os.getppid()):
            return int(signal.SIGTERM)
        return int(self.signal or 0)

    def __enter__(self) -> "Interruption":
        # Python hands signals to the main thread only; elsewhere they keep their meaning.
        if threading.current_thread() is threading.main_thread():
            # Installed before the tie is loosened: whenever the launcher dies, it is noticed.
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in SIGNALS if not is_ignored(number)
            }
        self._tie_release.enter_context(suspend_tie())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore_handlers()
        self._tie_release.close()

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore_handlers()
        detach_dead_terminal()
        if self._prints_notice:
            # A handler may run in the middle of a print: it writes past the buffers.
            told = f"\n{self.signal.name}: finishing this step, then a checkpoint; again to leave at once\n"
            with suppress(OSError):  # nobody reads any more, which must not end the run before its checkpoint
                os.write(2, told.encode())

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous_handlers = {}
