"""A polite end: the first SIGTERM or SIGINT asks the loop to finish its step, the second ends the program at once."""

import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether a signal asked this run to stop; a context that gives the signals back at its end."""

    def __init__(self, speaks: bool = True) -> None:
        """Of several processes that get the same signal, one speaks."""
        self._speaks = speaks
        self.signal: signal.Signals | None = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._earlier: dict[signal.Signals, object] = {}

    @property
    def number(self) -> int:
        """The signal's number, 0 when there was none; the launcher's death is a SIGTERM to those whom it started."""
        if self.signal is None and self._launcher not in (None, os.getppid()):
            return int(signal.SIGTERM)
        return int(self.signal or 0)

    def __enter__(self) -> "Interruption":
        # Python hands signals to the main thread only; elsewhere they keep their meaning.
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._give_back()
        if self._speaks:
            # A handler may run in the middle of a print: it writes past the buffers.
            told = f"\n{self.signal.name}: finishing this step, then a checkpoint; again to leave at once\n"
            os.write(2, told.encode())

    def _give_back(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._earlier = {}
