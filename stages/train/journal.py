"""What the steps between two lines of the journal add up to; the sums of several processes add up likewise.

What a run tells about itself: a JSON line now and then, the same numbers for trackers, and a view of the moment.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.flow.timesteps import bin_of_time
from stages.system.atomic import atomic_write
from stages.system.disk import refuse_unwritable, refuse_write_errors
from stages.system.forecast import Forecast
from stages.system.refusal import Refused, in_one_line
from stages.train.live import SilentDisplay, make_display
from stages.train.objective import Losses
from stages.train.runtime import Runtime
from stages.train.trackers import EMPTY_MAPPING, TrackingConfig, make_trackers

JOURNAL_BINS = 10
BY_S_NAMES = ("flow_by_s", "guidance_by_s", "blocks_by_s")


@dataclass(frozen=True)
class StepResult:
    """What one step has to tell."""

    losses: Losses
    lambdas: Float[Tensor, " n_blocks"]
    block_weight: float
    s: Float[Tensor, " b"]
    grad_norm: Float[Tensor, ""]
    learning_rate: float
    data_wait_seconds: float
    group: Int[Tensor, " b"] | None = None
    """which group of the journal's each sample belongs to"""


class Window:
    """Sums over the steps since the last line; tensors stay on their device until they are asked for."""

    def __init__(self, groups: Sequence[str] = ()) -> None:
        """`groups` are told apart; samples that have none are not counted among them."""
        self.groups = tuple(groups)
        self.steps, self.data_wait_seconds, self.bookkeeping_seconds = 0, 0.0, 0.0
        self.started_at = time.perf_counter()
        self._sums: dict[str, Tensor] = {}

    def add(self, step: StepResult) -> None:
        """Count one step in."""
        parts = _parts(step)
        if self.groups:
            parts["by_group"] = _by_group(step, len(self.groups))
        self._sums = {name: self._sums[name] + part for name, part in parts.items()} if self.steps else parts
        self.steps += 1
        self.data_wait_seconds += step.data_wait_seconds
        self.learning_rate, self.block_weight = step.learning_rate, step.block_weight

    def sums(self) -> dict[str, Tensor]:
        """All that is added up over steps, samples and processes, on the device of the steps."""
        counted = {"processes": 1.0, "steps": float(self.steps)}
        counted |= {"data_wait_seconds": self.data_wait_seconds, "bookkeeping_seconds": self.bookkeeping_seconds}
        device = self._sums["loss"].device
        return {**self._sums, **{name: torch.tensor(value, device=device) for name, value in counted.items()}}

    def journal_line(
        self, samples: int, blocks: Sequence[str], sums: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """The means of the window as one line of the journal; a bin of s without a sample is null.

        `sums` are those of all processes together, where there are several. Errors by bin are means over samples,
        before omega and w(s), the blocks' being sum_b lambda_b e_b; everything else is the mean over the steps.
        """
        total = {name: value.cpu() for name, value in (sums or self.sums()).items()}
        mean = {name: (value / total["steps"]).tolist() for name, value in total.items()}
        count, *errors, omega, square = total["by_bin"]
        seconds = time.perf_counter() - self.started_at
        by_bin = {name: _nan_to_none(error / count) for name, error in zip(BY_S_NAMES, errors, strict=True)}
        return {
            "samples": samples,
            **{name: mean[name] for name in ("loss", "flow", "guidance", "block_term")},
            "blocks": dict(zip(blocks, mean["blocks"], strict=True)),
            "lambdas": dict(zip(blocks, mean["lambdas"], strict=True)),
            "block_weight": self.block_weight,
            **by_bin,
            **self._group_metrics(total),
            "effective_size": float(omega.sum() ** 2 / (count.sum() * square.sum())),
            "effective_size_by_s": _nan_to_none(omega**2 / (count * square)),
            "learning_rate": self.learning_rate,
            "grad_norm": mean["grad_norm"],
            "samples_per_second": float(count.sum()) / seconds,
            "window_seconds": seconds,
            **{name: float(total[name] / total["processes"]) for name in ("data_wait_seconds", "bookkeeping_seconds")},
        }

    def _group_metrics(self, total: Mapping[str, Tensor]) -> dict[str, Any]:
        if not self.groups:
            return {}
        count, error = total["by_group"]
        return {"flow_by_class": dict(zip(self.groups, _nan_to_none(error / count), strict=True))}


def _parts(step: StepResult) -> dict[str, Tensor]:
    """The summands of one step; `by_bin` holds, by bin of s: samples, three errors, omega and its square."""
    losses, lambdas = step.losses, step.lambdas
    block_term = (lambdas[:, None] * losses.block_errors).sum(dim=0)
    ones = torch.ones_like(losses.flow_errors)
    rows = (
        ones,
        losses.flow_errors,
        losses.guidance_errors,
        block_term,
        losses.importance_weight,
        losses.importance_weight**2,
    )
    stacked = torch.stack(rows).double()
    return {
        "loss": losses.total.detach(),
        "flow": losses.flow,
        "guidance": losses.guidance,
        "block_term": (lambdas * losses.blocks).sum(),
        "blocks": losses.blocks,
        "lambdas": lambdas,
        "grad_norm": step.grad_norm,
        "by_bin": stacked.new_zeros(len(rows), JOURNAL_BINS).index_add_(1, bin_of_time(step.s, JOURNAL_BINS), stacked),
    }


def _nan_to_none(values: Float[Tensor, " n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _by_group(step: StepResult, groups: int) -> Float[Tensor, "2 groups"]:
    """Samples and flow errors of each group."""
    errors = step.losses.flow_errors.double()
    sums = errors.new_zeros(2, groups)
    stacked = torch.stack([torch.ones_like(errors), errors])
    return sums if step.group is None else sums.index_add_(1, step.group, stacked)


__all__ = ["Journal", "StepResult", "Window", "flatten", "read_events", "read_step_lines", "truncate_after"]

JOURNAL_FILE = "journal.jsonl"
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
        runtime: Runtime,
        tracking: TrackingConfig | None = None,
        run_config: Mapping[str, Any] = EMPTY_MAPPING,
        groups: Sequence[str] = (),
    ) -> None:
        self.path, self.blocks, self.runtime = folder / JOURNAL_FILE, tuple(blocks), runtime
        self.window = Window(groups)
        if runtime.is_main:
            refuse_unwritable(self.path)
            truncate_after(self.path, samples)
        asked = (tracking or TrackingConfig()) if runtime.is_main else TrackingConfig(to=())
        self._trackers = make_trackers(asked, folder, samples, run_config)
        self._display = make_display(str(folder), samples, max_samples) if runtime.is_main else SilentDisplay()
        self._forecast = Forecast("train", "samples", max_samples, self._display.print_line, samples)
        self._samples, self._paused_seconds = samples, 0.0
        for trouble in self._trackers.start():
            self.show_warning(trouble)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for trouble in self._trackers.close():
            self.show_warning(trouble)
        self._display.close()

    @contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """Count the time spent within as bookkeeping of the window."""
        begun = time.perf_counter()
        yield
        self.window.bookkeeping_seconds += time.perf_counter() - begun

    def add(self, step: StepResult | None, samples: int) -> None:
        """Count one step in, after which all processes have seen so many samples; None is a step that was skipped."""
        with self.bookkeeping():
            self._samples = samples
            if step is None:
                self.show_warning("step skipped, loss or gradient was not finite; mishaps.jsonl names the samples")
            else:
                self.window.add(step)
            self._display.show_progress(samples)
            self._forecast.progress(samples)

    def write(
        self, samples: int, extra_metrics: Mapping[str, Any] = EMPTY_MAPPING, warnings: Sequence[str] = ()
    ) -> None:
        """Write the means since the last line and `more`, if there was a step since, and begin a new window.

        `warnings` are shown beside the line, for as long as they are told again.
        """
        if not self.window.steps:
            return
        begun, own = time.perf_counter(), self.window.sums()
        sums = dict(zip(own, self.runtime.all_reduce_sum(list(own.values())), strict=True))
        if self.runtime.is_main:
            line = {
                **self.window.journal_line(samples, self.blocks, sums),
                "memory_gib": memory_gib(self.runtime.device),
            }
            line |= {"paused_seconds": self._paused_seconds, **extra_metrics}
            self._append(line)
            self._display.show_line(line, [*warnings, *self._track(flatten(line), samples)])
        self.window, self._paused_seconds = Window(self.window.groups), 0.0
        self.window.started_at = begun
        self.window.bookkeeping_seconds = time.perf_counter() - begun

    def write_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Write a line of another kind, such as a validation."""
        if not self.runtime.is_main:
            return
        self._append({"samples": samples, "kind": kind, **metrics}, fsync=True)
        for trouble in self._track([(f"{kind}/{name}", value) for name, value in flatten(metrics)], samples):
            self._display.show_warning(samples, trouble)
        self._display.show_event(samples, kind, metrics)

    def show_warning(self, text: str) -> None:
        """Show that something went wrong that does not end the run."""
        self._display.show_warning(self._samples, text)

    def exclude_pause(self) -> None:
        """Leave out of the rate what happened since the last line (a checkpoint, a grid); the next line names it."""
        self._paused_seconds += time.perf_counter() - self.window.started_at
        self.window = Window(self.window.groups)

    def _append(self, line: Mapping[str, Any], fsync: bool = False) -> None:
        with refuse_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            if fsync:  # a checkpoint may not outlive what was found of it: training ends by it
                file.flush()
                os.fsync(file.fileno())

    def _track(self, metrics: Sequence[tuple[str, float]], samples: int) -> list[str]:
        return self._trackers.log(dict(metrics), samples)


def memory_gib(device: torch.device) -> float:
    """The most that tensors took on a GPU so far; on a CPU what this process takes of the machine's memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return float(psutil.Process().memory_info().rss / GIB)


def read_step_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines about training in a run's journal, without those of another kind."""
    return [line for line in _read_complete_lines(folder / JOURNAL_FILE) if "kind" not in line]


def read_events(folder: Path, kind: str, samples: int) -> list[dict[str, Any]]:
    """The whole lines of a kind up to so many samples; none where there is no journal yet."""
    path = folder / JOURNAL_FILE
    told = _read_complete_lines(path) if path.is_file() else []
    return [line for line in told if line.get("kind") == kind and line["samples"] <= samples]


def _read_complete_lines(path: Path) -> list[dict[str, Any]]:
    """All lines but one that was cut off, or is being written."""
    return [said for _, said in _parse_lines(path)]


def _parse_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
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


def truncate_after(path: Path, samples: int) -> None:
    """Drop the lines beyond `samples`, and a last line that was cut off, so that no line is ever doubled."""
    if not path.exists():
        return
    kept = "".join(line for line, said in _parse_lines(path) if said["samples"] <= samples).encode()
    if len(kept) < path.stat().st_size:
        atomic_write(path, kept)


def flatten(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Names and numbers for a tracker: `blocks/mid`, `flow_by_s/3`."""
    found: list[tuple[str, Any]] = []
    for name, value in line.items():
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
        found += [(name, value)] if parts is None else [(f"{name}/{key}", part) for key, part in parts]
    return [(name, value) for name, value in found if name != "samples" and isinstance(value, int | float)]
