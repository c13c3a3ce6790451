"""How SIGTERM, SIGINT and SIGHUP end a program: at once with its cleanup, or after the current step of a loop.

A closed terminal sends SIGHUP. It stays ignored where it was ignored at the start, as under `nohup`.
"""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import FrameType, TracebackType

from stages.system.ending import EXIT_INTERRUPTED
from stages.system.terminal import redirect_to_devnull
from stages.system.tied import suspend_tie

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def unless_nohup(numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """The signals without SIGHUP where that is ignored."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in numbers if not (nohup and number == signal.SIGHUP)]


@contextmanager
def signal_handler(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Handle the signals by `handler`; without effect in a thread, as Python runs handlers in the main thread only."""
    is_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in unless_nohup(numbers) if is_main}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def interrupt_on(*numbers: signal.Signals) -> AbstractContextManager[None]:
    """The first of these signals raises `KeyboardInterrupt`; another one ends the process at once."""
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            os._exit(EXIT_INTERRUPTED)  # a cache survives it, as it survives kill -9
        interrupted = True
        detach_dead_terminal()
        raise KeyboardInterrupt

    return signal_handler(interrupt, *numbers)


def detach_dead_terminal() -> None:
    """Redirect output and errors to /dev/null where they went to a closed terminal: printing would end the program."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                redirect_to_devnull(descriptor)


class Interruption:
    """A context in which the first signal asks a loop to finish its step; the second one ends the program."""

    def __init__(self, prints_notice: bool = True) -> None:
        """`prints_notice` is true for one of several processes that get the same signal."""
        self._prints_notice = prints_notice
        self._signal: signal.Signals | None = None
        self._launcher_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._handlers, self._suspended_tie = ExitStack(), ExitStack()

    @property
    def signal_number(self) -> int:
        """The number of the signal, 0 without one; the death of the process launcher counts as SIGTERM."""
        if self._signal is None and self._launcher_pid not in (None, os.getppid()):
            return int(signal.SIGTERM)
        return int(self._signal or 0)

    def __enter__(self) -> "Interruption":
        # Handlers come before the tie is suspended: so the launcher's death is noticed at any moment.
        self._handlers.enter_context(signal_handler(self._handle_signal, *STOP_SIGNALS))
        self._suspended_tie.enter_context(suspend_tie())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()
        self._suspended_tie.close()

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        self._handlers.close()
        detach_dead_terminal()
        if self._prints_notice:
            notice = f"\n{self._signal.name}: finishing this step, then a checkpoint; again to leave at once\n"
            with suppress(OSError):  # a closed stream must not end the run before its checkpoint
                os.write(2, notice.encode())  # past the buffers: a handler may run in the middle of a print
