"""A run as one watches it: a board in a terminal, one line a time in a log, nothing on other processes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console

from configs.terminal import console as console_of
from stages.train.board import Board, Clock, counted, share


class View(Protocol):
    """What the journal shows; `line` and `found` are what it writes."""

    def progress(self, samples: int) -> None:
        """So many samples are seen."""
        ...

    def line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """The means of a window, and what is wrong at present."""
        ...

    def note(self, samples: int, kind: str, found: Mapping[str, Any]) -> None:
        """Something else was found."""
        ...

    def warn(self, samples: int, text: str) -> None:
        """Something went wrong once."""
        ...

    def say(self, text: str) -> None:
        """A line that stands by itself."""
        ...

    def close(self) -> None:
        """The run is over, or left."""
        ...


class Silent:
    """Shows nothing."""

    def progress(self, samples: int) -> None:
        """Nothing."""

    def line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """Nothing."""

    def note(self, samples: int, kind: str, found: Mapping[str, Any]) -> None:
        """Nothing."""

    def warn(self, samples: int, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """One line for each line of the journal: a word, then name=value."""

    def __init__(self, samples: int, max_samples: int, console: Console) -> None:
        self._clock, self._console = Clock(samples, max_samples), console

    def progress(self, samples: int) -> None:
        """A log is not told of single steps."""

    def line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """`train samples=640 of=44800 loss=... left=0:05:12`, and a warning line for each trouble."""
        samples = line["samples"]
        told = [f"samples={samples} of={self._clock.max_samples}"]
        told += [f"{name}={line[name]:.4g}" for name in ("loss", "flow", "guidance", "block_term", "grad_norm")]
        told += [f"lr={line['learning_rate']:.3g} rate={line['samples_per_second']:.1f}/s"]
        told += [f"wait={share(line, 'data_wait_seconds')} memory={line['memory_gib']:.2f}GiB"]
        told += [f"left={self._clock.left(samples)}", *(f"{name}={count}" for name, count in counted(line).items())]
        self._print(f"train {' '.join(told)}")
        for warning in warnings:
            self.warn(samples, warning)

    def note(self, samples: int, kind: str, found: Mapping[str, Any]) -> None:
        """`validation samples=640 held_out=... cache_gap=...`."""
        told = [f"{name}={value:.4g}" for name, value in found.items() if isinstance(value, int | float)]
        self._print(f"{kind} samples={samples} {' '.join(told)}")

    def warn(self, samples: int, text: str) -> None:
        """`warning samples=640 ...`."""
        self._print(f"warning samples={samples} {text}")

    def say(self, text: str) -> None:
        """The line as it is."""
        self._print(text)

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def view_of(title: str, samples: int, max_samples: int) -> View:
    """A board where standard output is a terminal, else lines."""
    console = console_of()
    if console.is_terminal and not console.is_dumb_terminal:
        return Board(title, samples, max_samples, console)
    return Lines(samples, max_samples, console)
