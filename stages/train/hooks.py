"""What a story wants to do or to say while its student is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.nets.student import Student
from stages.train.checkpoint import Elsewhere


class Measured(Protocol):
    """What was found of a student at a checkpoint."""

    @property
    def kind(self) -> str:
        """What the journal calls it."""
        ...

    @property
    def score(self) -> float | None:
        """What the best checkpoint has least of; None when this one cannot be it."""
        ...

    def told(self) -> Mapping[str, Any]:
        """What the journal writes."""
        ...


def _look_away(_samples: int, _student: Student) -> None:
    return None


def _measure_nothing(_student: Student) -> None:
    return None


def _go_on(_samples: int) -> None:
    return None


def _do_nothing() -> None:
    return None


def _say_nothing() -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """Called on the main process alone, while the others wait."""

    validate: Callable[[Student], Measured | None] = _measure_nothing
    """Before each checkpoint, with the averaged student: what was measured of it, if anything was."""
    after_checkpoint: Callable[[Path], None] = lambda _folder: None
    """With the folder of each checkpoint that was written."""
    at_checkpoint: Callable[[int, Student], None] = _look_away
    """After each checkpoint with the averaged student, and again when a run goes on from one."""
    enough: Callable[[int], str | None] = _go_on
    """After each checkpoint, and when a run goes on, with the samples seen: why training is over, if it is."""
    extra: Callable[[], Mapping[str, Any]] = dict
    """More for each line of the journal: names, and numbers or mappings of numbers."""
    warning: Callable[[], str | None] = _say_nothing
    """Shown at each line of the journal as long as there is one."""
    elsewhere: Elsewhere | None = None
    """Asked when no checkpoint of this folder is whole."""
    begin: Callable[[], None] = _do_nothing
    """Once nothing can be refused any more, before the first step: what the run leaves of its settings."""
