"""A polite end: the first of these signals asks the loop to finish its step, the second ends the program at once.

A closed terminal sends SIGHUP, and then nothing can be printed any more: what was the terminal becomes nothing.
"""

import os
import signal
import threading
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType

from configs.hangup import is_ignored, leave_dead_terminal
from configs.tied import loosened

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interruption:
    """Whether a signal asked this run to stop; a context that gives the signals back at its end."""

    def __init__(self, speaks: bool = True) -> None:
        """Of several processes that get the same signal, one speaks."""
        self._speaks = speaks
        self.signal: signal.Signals | None = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._earlier: dict[signal.Signals, object] = {}
        self._loosened = ExitStack()

    @property
    def number(self) -> int:
        """The signal's number, 0 when there was none; the launcher's death is a SIGTERM to those whom it started."""
        if self.signal is None and self._launcher not in (None, os.getppid()):
            return int(signal.SIGTERM)
        return int(self.signal or 0)

    def __enter__(self) -> "Interruption":
        # Python hands signals to the main thread only; elsewhere they keep their meaning.
        if threading.current_thread() is threading.main_thread():
            # Installed before the tie is loosened: whenever the launcher dies, it is noticed.
            self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS if not is_ignored(number)}
        self._loosened.enter_context(loosened())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()
        self._loosened.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._give_back()
        leave_dead_terminal()
        if self._speaks:
            # A handler may run in the middle of a print: it writes past the buffers.
            told = f"\n{self.signal.name}: finishing this step, then a checkpoint; again to leave at once\n"
            with suppress(OSError):  # nobody reads any more, which must not end the run before its checkpoint
                os.write(2, told.encode())

    def _give_back(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._earlier = {}
