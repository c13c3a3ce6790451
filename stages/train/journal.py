"""`journal.jsonl`: means of the steps between two lines, events such as validations; also for trackers and display."""

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from configs.values import PictureSize
from stages.flow.timesteps import bin_of_time
from stages.system.atomic import atomic_write
from stages.system.disk import refuse_unwritable, refuse_write_errors
from stages.system.forecast import Forecast
from stages.system.refusal import Refused, in_one_line
from stages.train.live import RunDisplay, make_display
from stages.train.losses import StepResult
from stages.train.runtime import Runtime
from stages.train.trackers import EMPTY_MAPPING, TrackingConfig, flatten, make_trackers

JOURNAL_FILE = "journal.jsonl"
JOURNAL_BINS = 10
SECONDS_NAMES = ("data_wait_seconds", "bookkeeping_seconds")
TERMS_OF_TWO_BRANCHES = ("guidance", "block_term", "guidance_by_s", "blocks_by_s")
"""What the line of a student with one branch, guided already, leaves out: these are no terms of its loss."""
BY_S_NAMES = ("flow_by_s", "guidance_by_s", "blocks_by_s")


class Window:
    """Sums over the steps since the last line; tensors stay on their device until a line is written.

    Each of `groups` has a mean flow error of its own; samples without a group count in none of them. So has each of
    `sizes`.
    """

    def __init__(self, groups: Sequence[str] = (), sizes: Sequence[PictureSize] = ()) -> None:
        self.groups, self.sizes = tuple(groups), tuple(sizes)
        self.steps, self.data_wait_seconds, self.bookkeeping_seconds = 0, 0.0, 0.0
        self.started_at = time.perf_counter()
        self._sums: dict[str, Tensor] = {}

    def add(self, step: StepResult) -> None:
        """Add one step."""
        parts = _step_sums(step, len(self.groups), self.sizes)
        self._sums = {name: self._sums[name] + part for name, part in parts.items()} if self.steps else parts
        self.steps += 1
        self.data_wait_seconds += step.data_wait_seconds
        self.learning_rate, self.block_weight = step.learning_rate, step.block_weight

    def sums(self) -> dict[str, Tensor]:
        """Sums over steps and samples, on the device of the steps; those of several processes add up likewise."""
        counted = {"processes": 1.0, "steps": float(self.steps)}
        counted |= {name: getattr(self, name) for name in SECONDS_NAMES}
        device = self._sums["loss"].device
        return {**self._sums, **{name: torch.tensor(value, device=device) for name, value in counted.items()}}

    def journal_line(self, samples: int, blocks: Sequence[str], sums: Mapping[str, Tensor]) -> dict[str, Any]:
        """The means of the window as one line of the journal; a bin of s without a sample is null.

        `sums` are those of all processes. Errors by bin are means over samples, before importance weights and w(s),
        the blocks' being sum_b lambda_b e_b; all else is the mean over the steps.
        """
        total = {name: value.cpu() for name, value in sums.items()}
        mean = {name: (value / total["steps"]).tolist() for name, value in total.items()}
        count, *errors, weight, square = total["by_bin"]
        seconds = time.perf_counter() - self.started_at
        parts: dict[str, Any] = {
            name: _nan_to_none(error / count) for name, error in zip(BY_S_NAMES, errors, strict=True)
        }
        if self.groups:
            group_count, group_error = total["by_group"]
            parts["flow_by_class"] = dict(zip(self.groups, _nan_to_none(group_error / group_count), strict=True))
        if self.sizes:
            size_count, size_error = total["by_size"]
            parts["flow_by_size"] = dict(zip(map(str, self.sizes), _nan_to_none(size_error / size_count), strict=True))
        return {
            "samples": samples,
            **{name: mean[name] for name in ("loss", "flow", "guidance", "block_term")},
            "blocks": dict(zip(blocks, mean["blocks"], strict=True)),
            "lambdas": dict(zip(blocks, mean["lambdas"], strict=True)),
            "block_weight": self.block_weight,
            **parts,
            "effective_size": float(weight.sum() ** 2 / (count.sum() * square.sum())),
            "effective_size_by_s": _nan_to_none(weight**2 / (count * square)),
            "learning_rate": self.learning_rate,
            "grad_norm": mean["grad_norm"],
            "samples_per_second": float(count.sum()) / seconds,
            "window_seconds": seconds,
            **{name: float(total[name] / total["processes"]) for name in SECONDS_NAMES},
        }


def _step_sums(step: StepResult, group_count: int, sizes: Sequence[PictureSize]) -> dict[str, Tensor]:
    """The summands of one step.

    `by_bin` holds, by bin of s: samples, three errors, importance weights and their squares; `by_group` holds samples
    and flow errors of each group, `by_size` those of each size.
    """
    losses, lambdas, weight = step.losses, step.lambdas, step.losses.importance_weight
    block_term = (lambdas[:, None] * losses.block_errors).sum(dim=0)
    rows = (torch.ones_like(weight), losses.flow_errors, losses.guidance_errors, block_term, weight, weight**2)
    stacked = torch.stack(rows).double()
    sums = {
        "loss": losses.total.detach(),
        "flow": losses.flow,
        "guidance": losses.guidance,
        "block_term": (lambdas * losses.blocks).sum(),
        "blocks": losses.blocks,
        "lambdas": lambdas,
        "grad_norm": step.grad_norm,
        "by_bin": stacked.new_zeros(len(rows), JOURNAL_BINS).index_add_(1, bin_of_time(step.s, JOURNAL_BINS), stacked),
    }
    if group_count:
        by_group = stacked.new_zeros(2, group_count)
        sums["by_group"] = by_group if step.group is None else by_group.index_add_(1, step.group, stacked[:2])
    if sizes:
        own = torch.tensor([size == step.size for size in sizes], device=stacked.device)
        sums["by_size"] = own * stacked[:2].sum(dim=1, keepdim=True)
    return sums


def _nan_to_none(values: Float[Tensor, " n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


class Journal:
    """`journal.jsonl` of one run folder from `samples` on, its trackers and its display; a context.

    All processes of a run add their steps and write lines together; only the main one writes and shows anything.
    `run_config` is passed to the trackers; `groups` and `sizes` are those of the samples, see `Window`.
    Without `two_branches` a line leaves out what one branch has not.
    """

    def __init__(
        self,
        folder: Path,
        samples: int,
        max_samples: int,
        blocks: Sequence[str],
        runtime: Runtime,
        tracking: TrackingConfig,
        run_config: Mapping[str, Any] = EMPTY_MAPPING,
        groups: Sequence[str] = (),
        sizes: Sequence[PictureSize] = (),
        two_branches: bool = True,
    ) -> None:
        self._left_out = () if two_branches else TERMS_OF_TWO_BRANCHES
        self.path, self.blocks, self.runtime = folder / JOURNAL_FILE, tuple(blocks), runtime
        self.window = Window(groups, sizes)
        if runtime.is_main:
            refuse_unwritable(self.path)
            truncate_after(self.path, samples)
        tracking = tracking if runtime.is_main else TrackingConfig(to=())
        self._trackers = make_trackers(tracking, folder, samples, run_config)
        self._display = make_display(str(folder), samples, max_samples) if runtime.is_main else RunDisplay()
        self._forecast = Forecast("train", "samples", max_samples, self._display.print_line, samples)
        self._samples, self._paused_seconds = samples, 0.0
        for failure in self._trackers.start():
            self.show_warning(failure)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        for failure in self._trackers.close():
            self.show_warning(failure)
        self._display.close()

    @contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """Count the time spent within as bookkeeping of the window."""
        start = time.perf_counter()
        yield
        self.window.bookkeeping_seconds += time.perf_counter() - start

    def add(self, step: StepResult | None, samples: int) -> None:
        """Add one step, after which all processes have seen `samples` samples; None is a skipped step."""
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
        """Write the means since the last line and `extra_metrics`, if there was a step since, and open a new window.

        `warnings` are shown beside the line until the next one.
        """
        if not self.window.steps:
            return
        start, own = time.perf_counter(), self.window.sums()
        sums = dict(zip(own, self.runtime.all_reduce_sum(list(own.values())), strict=True))
        if self.runtime.is_main:
            means = self.window.journal_line(samples, self.blocks, sums)
            line = {
                **{name: value for name, value in means.items() if name not in self._left_out},
                "memory_gib": memory_gib(self.runtime.device),
                "paused_seconds": self._paused_seconds,
                **extra_metrics,
            }
            self._append(line)
            self._display.show_line(line, [*warnings, *self._trackers.log(flatten(line), samples)])
        self.window, self._paused_seconds = Window(self.window.groups, self.window.sizes), 0.0
        self.window.started_at = start
        self.window.bookkeeping_seconds = time.perf_counter() - start

    def write_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Write a line of another kind, such as a validation."""
        if not self.runtime.is_main:
            return
        self._append({"samples": samples, "kind": kind, **metrics}, fsync=True)
        values = {f"{kind}/{name}": value for name, value in flatten(metrics).items()}
        for failure in self._trackers.log(values, samples):
            self._display.show_warning(samples, failure)
        self._display.show_event(samples, kind, metrics)

    def show_warning(self, text: str) -> None:
        """Show a problem that does not end the run."""
        self._display.show_warning(self._samples, text)

    def exclude_pause(self) -> None:
        """Leave the time since the last line (a checkpoint, a grid) out of the rate; the next line holds it."""
        self._paused_seconds += time.perf_counter() - self.window.started_at
        self.window = Window(self.window.groups, self.window.sizes)

    def _append(self, line: Mapping[str, Any], fsync: bool = False) -> None:
        with refuse_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            if fsync:  # a checkpoint may not outlive its event, which decides when training ends
                file.flush()
                os.fsync(file.fileno())


def memory_gib(device: torch.device) -> float:
    """The most that tensors took on a GPU so far; on a CPU the present memory of this process. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss / 2**30)


def read_step_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines about training in a run's journal, without events and without an incomplete last line."""
    return [line for _, line in _parse_lines(folder / JOURNAL_FILE) if "kind" not in line]


def read_events(folder: Path, kind: str, samples: int) -> list[dict[str, Any]]:
    """The complete lines of a kind up to so many samples; none where there is no journal yet."""
    path = folder / JOURNAL_FILE
    lines = _parse_lines(path) if path.is_file() else []
    return [line for _, line in lines if line.get("kind") == kind and line["samples"] <= samples]


def truncate_after(path: Path, samples: int) -> None:
    """Drop the lines beyond `samples`, and an incomplete last line, so that no line is ever doubled."""
    if not path.exists():
        return
    kept = "".join(text for text, line in _parse_lines(path) if line["samples"] <= samples).encode()
    if len(kept) < path.stat().st_size:
        atomic_write(path, kept)


def _parse_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each complete line, as text and parsed; raises `Refused` for the first that is no line of a journal."""
    parsed = list[tuple[str, dict[str, Any]]]()
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
            text = content.decode()
            line = json.loads(text)
            if type(line["samples"]) is not int:
                raise ValueError("samples is no whole number")
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise Refused(
                f"{path}:{number}: no line of a journal ({in_one_line(error, 80)}) - remove it, or move the file away"
            ) from error
        parsed.append((text, line))
    return parsed
