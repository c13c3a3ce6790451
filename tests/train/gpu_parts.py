"""Parts of a run that end in every way, for the GPU script's supervision; nothing here loads a library."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import Budget, BudgetUsed

Record = Callable[[Mapping[str, Any]], None]


class World:
    """Counts what was given back."""

    def __init__(self, report: Path) -> None:
        self.report, self.releases = report, 0

    def release(self) -> None:
        self.releases += 1


@dataclass(frozen=True)
class Settings:
    """Of such a world."""

    report: Path

    def open(self) -> World:
        return World(self.report)


def measures(world: World, budget: Budget, record: Record) -> None:
    record({"pid": os.getpid(), "budget": budget.seconds, "releases": world.releases})


def reads_the_report(world: World, _budget: Budget, record: Record) -> None:
    for number in range(3):
        record({f"figure {number}": number / 3})
        part = json.loads(world.report.read_text())["parts"][0]
        assert part["status"] == "running"
        assert len(part["figures"]) == number + 1


def fails(_world: World, _budget: Budget, record: Record) -> None:
    record({"pid": os.getpid()})
    raise RuntimeError("a shape\n  is wrong")


def finds_no_memory(_world: World, _budget: Budget, _record: Record) -> None:
    raise RuntimeError("CUDA error: out of memory, 80 GiB")


def breaks_the_device(_world: World, _budget: Budget, record: Record) -> None:
    record({"pid": os.getpid()})
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def uses_its_budget(_world: World, budget: Budget, record: Record) -> None:
    record({"steps": 3})
    while True:
        time.sleep(0.01)
        budget.check("another step")


def never_looks_at_its_budget(_world: World, _budget: Budget, record: Record) -> None:
    record({"begun": True, "infinite": float("inf")})
    time.sleep(600)


def crashes(_world: World, _budget: Budget, record: Record) -> None:
    record({"begun": True})
    os.kill(os.getpid(), signal.SIGKILL)


def is_interrupted(_world: World, _budget: Budget, record: Record) -> None:
    record({"begun": True})
    raise KeyboardInterrupt


def has_enough(_world: World, _budget: Budget, _record: Record) -> None:
    raise BudgetUsed("budget of 1 s used up before a step")
