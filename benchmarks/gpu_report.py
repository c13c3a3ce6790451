"""The record of a GPU run as one JSON file, whole at any moment: its parts, their budgets, figures and errors."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

SCHEMA = 1
DIGITS = 5
"""Significant digits of a figure."""

Status: TypeAlias = Literal["waiting", "running", "done", "budget used", "failed", "killed", "left out", "cut off"]
RecordFigures: TypeAlias = Callable[[Mapping[str, Any]], None]
"""Adds figures to those of the running part."""


class BudgetUsed(Refused):
    """The time of a part is over; what it measured so far stands.

    As a refusal it is the fault of no prompt, so that the filling of a cache ends with it.
    """


@dataclass(frozen=True)
class Part:
    """One part of the run."""

    name: str
    purpose: str
    run: str
    """`module:function`, called with (world, budget, record)"""
    seconds: float
    """its budget in a run of eight minutes"""
    least_seconds: float
    """with fewer left of the run it is left out"""
    alone: bool = False
    """in a process of its own, because nothing in it can be stopped but by ending the process"""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    status: Status
    error: str | None = None
    """one line"""
    breaks_device: bool = False
    """whether the process cannot use its device any more"""


@dataclass(frozen=True)
class Budget:
    """The seconds of one part, counted from its construction."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _started: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started.append(self.clock())

    @property
    def left(self) -> float:
        """Seconds that are left; negative when it is used up."""
        return self.seconds - (self.clock() - self._started[0])

    def check(self, before: str, needed: float = 0.0) -> None:
        """Raise `BudgetUsed` unless more than `needed` seconds are left for what comes next."""
        if self.left <= needed:
            raise BudgetUsed(f"budget of {self.seconds:.0f} s used up before {before}")


class Report:
    """The JSON file; it is written at once and at every change, each time whole."""

    def __init__(self, path: Path, parts: Sequence[Part], facts: Mapping[str, Any]) -> None:
        self.path, self._clock, self._began = path, time.monotonic, time.monotonic()
        self._part_began = self._began
        self._content: dict[str, Any] = {
            "schema": SCHEMA,
            **facts,
            "state": "running",
            "seconds": 0.0,
            "parts": [
                {
                    "name": part.name,
                    "purpose": part.purpose,
                    "status": "waiting",
                    "budget_seconds": None,
                    "seconds": None,
                    "error": None,
                    "figures": {},
                }
                for part in parts
            ],
        }
        self._write()

    @property
    def statuses(self) -> dict[str, Status]:
        """The status of each part."""
        return {entry["name"]: entry["status"] for entry in self._content["parts"]}

    def begin(self, name: str, budget_seconds: float) -> None:
        """The part starts."""
        self._part_began = self._clock()
        self._change(name, status="running", budget_seconds=round(budget_seconds, 1))

    def record(self, name: str, figures: Mapping[str, Any]) -> None:
        """Add figures of a part, in place of earlier ones of the same name."""
        seconds = round(self._clock() - self._part_began, 1)
        self._change(name, seconds=seconds, figures={**self._entry(name)["figures"], **figures})

    def end(self, name: str, outcome: Outcome) -> None:
        """The part ended."""
        seconds = round(self._clock() - self._part_began, 1)
        self._change(name, status=outcome.status, error=outcome.error, seconds=seconds)

    def leave_out(self, name: str, reason: str) -> None:
        """The part is not begun."""
        self._change(name, status="left out", error=reason)

    def close(self, state: Literal["complete", "cut off"]) -> None:
        """The run ended; what still runs or waits in a run that is cut off is marked so."""
        for entry in self._content["parts"] if state == "cut off" else ():
            if entry["status"] in ("running", "waiting"):
                entry["status"] = "cut off" if entry["status"] == "running" else "left out"
                entry["error"] = "the run was ended from outside"
        self._content["state"] = state
        self._write()

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = next(entry for entry in self._content["parts"] if entry["name"] == name)
        return entry

    def _change(self, name: str, **values: Any) -> None:
        self._entry(name).update(values)
        self._write()

    def _write(self) -> None:
        self._content["seconds"] = round(self._clock() - self._began, 1)
        text = json.dumps(as_json(self._content), indent=1, allow_nan=False)
        atomic_write(self.path, text + "\n")


def as_json(value: Any) -> Any:
    """The value with numbers of a few digits; those that are not finite, which JSON does not know, as text."""
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    raise TypeError(f"{type(value).__name__} is no figure of a report")
