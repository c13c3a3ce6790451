"""What a run tells about itself: a JSON line now and then, the same numbers for trackers, and a view of the moment."""

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from configs.atomic import atomic_write
from configs.disk import refuse_unwritable, writing
from configs.refusal import Refused, in_one_line
from stages.forecast import Forecast
from stages.train.live import Silent, view_of
from stages.train.machine import Machine
from stages.train.trackers import NOTHING, TrackingConfig, trackers_of
from stages.train.window import Step, Window

__all__ = ["Journal", "Step", "Window", "flat", "forget_after", "notes", "steps_told"]

FILE = "journal.jsonl"
GIB = 2**30


class Journal:
    """`journal.jsonl` of one run folder, taken up again at `samples`, and all who read along; a context.

    All processes of a run count their steps in and ask for lines together; only the main one writes and shows
    anything. `facts` (the configuration, say) are told to the trackers once. `groups` names those of the samples that
    are told apart.
    """

    def __init__(
        self,
        folder: Path,
        samples: int,
        max_samples: int,
        blocks: Sequence[str],
        machine: Machine,
        tracking: TrackingConfig | None = None,
        facts: Mapping[str, Any] = NOTHING,
        groups: Sequence[str] = (),
    ) -> None:
        self.path, self.blocks, self.machine = folder / FILE, tuple(blocks), machine
        self.window = Window(groups)
        if machine.is_main:
            refuse_unwritable(self.path)
            forget_after(self.path, samples)
        asked = (tracking or TrackingConfig()) if machine.is_main else TrackingConfig(to=())
        self._trackers = trackers_of(asked, folder, samples, facts)
        self._view = view_of(str(folder), samples, max_samples) if machine.is_main else Silent()
        self._forecast = Forecast("train", "samples", max_samples, self._view.say, samples)
        self._samples, self._paused_seconds = samples, 0.0
        for trouble in self._trackers.start():
            self.warn(trouble)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for trouble in self._trackers.close():
            self.warn(trouble)
        self._view.close()

    @contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """Count the time spent within as bookkeeping of the window."""
        begun = time.perf_counter()
        yield
        self.window.bookkeeping_seconds += time.perf_counter() - begun

    def add(self, step: Step | None, samples: int) -> None:
        """Count one step in, after which all processes have seen so many samples; None is a step that was skipped."""
        with self.bookkeeping():
            self._samples = samples
            if step is None:
                self.warn("step skipped, loss or gradient was not finite; mishaps.jsonl names the samples")
            else:
                self.window.add(step)
            self._view.progress(samples)
            self._forecast.progress(samples)

    def write(self, samples: int, more: Mapping[str, Any] = NOTHING, warnings: Sequence[str] = ()) -> None:
        """Write the means since the last line and `more`, if there was a step since, and begin a new window.

        `warnings` are shown beside the line, for as long as they are told again.
        """
        if not self.window.steps:
            return
        begun, own = time.perf_counter(), self.window.sums()
        sums = dict(zip(own, self.machine.sum(list(own.values())), strict=True))
        if self.machine.is_main:
            line = {**self.window.line(samples, self.blocks, sums), "memory_gib": memory_gib(self.machine.device)}
            line |= {"paused_seconds": self._paused_seconds, **more}
            self._append(line)
            self._view.line(line, [*warnings, *self._track(flat(line), samples)])
        self.window, self._paused_seconds = Window(self.window.groups), 0.0
        self.window.since = begun
        self.window.bookkeeping_seconds = time.perf_counter() - begun

    def note(self, samples: int, kind: str, found: Mapping[str, Any]) -> None:
        """Write a line of another kind, such as a validation."""
        if not self.machine.is_main:
            return
        self._append({"samples": samples, "kind": kind, **found}, lasting=True)
        for trouble in self._track([(f"{kind}/{name}", value) for name, value in flat(found)], samples):
            self._view.warn(samples, trouble)
        self._view.note(samples, kind, found)

    def warn(self, text: str) -> None:
        """Show that something went wrong that does not end the run."""
        self._view.warn(self._samples, text)

    def pause(self) -> None:
        """Leave out of the rate what happened since the last line (a checkpoint, a grid); the next line names it."""
        self._paused_seconds += time.perf_counter() - self.window.since
        self.window = Window(self.window.groups)

    def _append(self, line: Mapping[str, Any], lasting: bool = False) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            if lasting:  # a checkpoint may not outlive what was found of it: training ends by it
                file.flush()
                os.fsync(file.fileno())

    def _track(self, named: Sequence[tuple[str, float]], samples: int) -> list[str]:
        return self._trackers.log(dict(named), samples)


def memory_gib(device: torch.device) -> float:
    """The most that tensors took on a GPU so far; on a CPU what this process takes of the machine's memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return float(psutil.Process().memory_info().rss / GIB)


def steps_told(folder: Path) -> list[dict[str, Any]]:
    """The lines about training in a run's journal, without those of another kind."""
    return [line for line in _whole(folder / FILE) if "kind" not in line]


def notes(folder: Path, kind: str, samples: int) -> list[dict[str, Any]]:
    """The whole lines of a kind up to so many samples; none where there is no journal yet."""
    path = folder / FILE
    told = _whole(path) if path.is_file() else []
    return [line for line in told if line.get("kind") == kind and line["samples"] <= samples]


def _whole(path: Path) -> list[dict[str, Any]]:
    """All lines but one that was cut off, or is being written."""
    return [said for _, said in _read(path)]


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line with what it says; raises `Refused` with the first that is no line of a journal."""
    found = list[tuple[str, dict[str, Any]]]()
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise IsADirectoryError(errno.EISDIR, "it is no file")
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}) - move it away, or name another run") from error
    for number, content in enumerate(lines, 1):
        if not content.endswith(b"\n"):
            continue
        try:
            line = content.decode()
            said = json.loads(line)
            if type(said["samples"]) is not int:
                raise ValueError("samples is no whole number")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise Refused(
                f"{path}:{number}: no line of a journal ({in_one_line(error, 80)}) - remove it, or move the file away"
            ) from error
        found.append((line, said))
    return found


def forget_after(path: Path, samples: int) -> None:
    """Drop the lines beyond `samples`, and a last line that was cut off, so that no line is ever doubled."""
    if not path.exists():
        return
    kept = "".join(line for line, said in _read(path) if said["samples"] <= samples).encode()
    if len(kept) < path.stat().st_size:
        atomic_write(path, kept)


def flat(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Names and numbers for a tracker: `blocks/mid`, `flow_by_s/3`."""
    found: list[tuple[str, Any]] = []
    for name, value in line.items():
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
        found += [(name, value)] if parts is None else [(f"{name}/{key}", part) for key, part in parts]
    return [(name, value) for name, value in found if name != "samples" and isinstance(value, int | float)]
