"""The three streams of a process and what is drawn on them: none of them can end a command."""

import io
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

RAISING_ERROR_MODES = {"strict", "surrogateescape"}
"""How a stream meets a letter that its encoding lacks: by an exception."""


def prepare_streams() -> None:
    """Open the streams that were closed, and let each show the escape of a letter that it cannot print.

    A closed stream's number would go to the first file that is opened, a shard perhaps, and be printed into.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdin = sys.stdin or _open_devnull("r")
    sys.stdout, sys.stderr = sys.stdout or _open_devnull("w"), sys.stderr or _open_devnull("w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in RAISING_ERROR_MODES:
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Let libraries speak of errors only, unless the user's environment says otherwise; set before they are imported.

    The hub's bars go too: transformers draws one per loaded folder and knows no other switch.
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
    for category in (DeprecationWarning, FutureWarning):  # they speak to programmers; -W comes before
        warnings.simplefilter("ignore", category, append=True)


def is_colourless(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether NO_COLOR asks for plain text: it does with any value but an empty one (https://no-color.org)."""
    return environment.get("NO_COLOR", "") != ""


def console(width: int | None = None) -> "Console":
    """rich's console on standard output, without any colour, bold or dim where NO_COLOR asks for that."""
    from rich.console import Console  # here, so that `sollune --help` does without

    return Console(file=sys.stdout, width=width, color_system=None if is_colourless() else "auto")


def redirect_to_devnull(stream: TextIO) -> None:
    """Send what is still to be written nowhere, so that Python's own last flush does not complain."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _open_devnull(mode: Literal["r", "w"]) -> TextIO:
    return Path(os.devnull).open(mode, encoding="utf-8")
