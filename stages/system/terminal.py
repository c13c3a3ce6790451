"""The standard streams of a process, made so that none of them can end a command, and rich's console."""

import io
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

RAISING_ERROR_MODES = {"strict", "surrogateescape"}
"""Error modes in which a stream raises for a character that its encoding lacks."""


def prepare_streams() -> None:
    """Open closed streams on /dev/null, and have each print the escape of a character that its encoding lacks.

    The descriptor of a closed stream would else go to the first file that is opened, and prints would go into that.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
    sys.stdin = sys.stdin or _open_devnull("r")
    sys.stdout, sys.stderr = sys.stdout or _open_devnull("w"), sys.stderr or _open_devnull("w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in RAISING_ERROR_MODES:
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Have libraries print errors only, unless the user's environment sets them; before they are imported.

    The hub's progress bars go too: transformers prints one per loaded folder and has no other switch.
    """
    settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"PYTHON_TYRO_ANSI_CODES": "False"} if is_colourless() else {}),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for category in (DeprecationWarning, FutureWarning):  # for programmers; -W takes precedence
        warnings.simplefilter("ignore", category, append=True)


def is_colourless(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether NO_COLOR is set, to any value but an empty one (https://no-color.org)."""
    return environment.get("NO_COLOR", "") != ""


def console(width: int | None = None) -> "Console":
    """rich's console on standard output, without colour, bold and dim under NO_COLOR."""
    from rich.console import Console  # here, so that `sollune --help` does not import it

    return Console(file=sys.stdout, width=width, color_system=None if is_colourless() else "auto")


def redirect_to_devnull(stream: TextIO | int) -> None:
    """Send further output of a stream or descriptor to /dev/null, so that Python's last flush does not fail."""
    with suppress(OSError, ValueError):  # a stream in memory has no descriptor
        descriptor = stream if isinstance(stream, int) else stream.fileno()
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, descriptor)
        os.close(devnull)


def _open_devnull(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode, encoding="utf-8")
