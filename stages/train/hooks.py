"""What a story wants to do or to say while its student is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.nets.student import Student
from stages.train.checkpoint import Elsewhere
from stages.train.validation import Validated


def _look_away(_samples: int, _student: Student) -> None:
    return None


def _measure_nothing(_student: Student) -> None:
    return None


def _say_nothing() -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """Called on the main process alone, while the others wait."""

    validate: Callable[[Student], Validated | None] = _measure_nothing
    """Before each checkpoint, with the averaged student: its errors, if they were measured."""
    after_checkpoint: Callable[[Path], None] = lambda _folder: None
    """With the folder of each checkpoint that was written."""
    at_checkpoint: Callable[[int, Student], None] = _look_away
    """After each checkpoint with the averaged student, and again when a run goes on from one."""
    extra: Callable[[], Mapping[str, Any]] = dict
    """More for each line of the journal: names, and numbers or mappings of numbers."""
    warning: Callable[[], str | None] = _say_nothing
    """Shown at each line of the journal as long as there is one."""
    elsewhere: Elsewhere | None = None
    """Asked when no checkpoint of this folder is whole."""
