"""SIGHUP, which a closed terminal sends: ignored under `nohup`, and else the end of whatever can be printed."""

import os
import signal
import stat
from contextlib import suppress


def is_ignored(number: signal.Signals) -> bool:
    """Whether SIGHUP is ignored, as under `nohup`: then it stays so."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def leave_dead_terminal() -> None:
    """Let output and errors go nowhere where they went to a terminal that is no more, instead of ending the program."""
    for handle in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(handle).st_mode) and not os.isatty(handle):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)
