"""What a run tells about itself: one JSON line now and then, the same numbers for TensorBoard, and a progress bar."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from configs.atomic import atomic_write
from stages.flow.timesteps import bin_of
from stages.train.machine import Machine
from stages.train.objective import Losses

BINS = 10
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Step:
    """What one step has to tell."""

    losses: Losses
    lambdas: Float[Tensor, " n_blocks"]
    block_weight: float
    s: Float[Tensor, " b"]
    grad_norm: Float[Tensor, ""]
    learning_rate: float
    data_wait_seconds: float


class Window:
    """Sums over the steps since the last line; tensors stay on their device until they are asked for."""

    def __init__(self) -> None:
        self.steps, self.samples, self.data_wait_seconds = 0, 0, 0.0
        self.since = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._bin_errors: Float[Tensor, " bins"] | float = 0.0
        self._bin_counts: Int[Tensor, " bins"] | int = 0

    def add(self, step: Step) -> None:
        """Count one step in."""
        losses = step.losses
        parts = {"loss": losses.total.detach(), "flow": losses.flow, "guidance": losses.guidance}
        parts |= {"blocks": losses.blocks, "lambdas": step.lambdas, "grad_norm": step.grad_norm}
        self._sums = {name: self._sums[name] + part if self.steps else part for name, part in parts.items()}
        index = bin_of(step.s, BINS)
        self._bin_errors = self._bin_errors + torch.bincount(index, losses.flow_errors, minlength=BINS)
        self._bin_counts = self._bin_counts + torch.bincount(index, minlength=BINS)
        self.steps, self.samples = self.steps + 1, self.samples + len(step.s)
        self.data_wait_seconds += step.data_wait_seconds
        self.learning_rate, self.block_weight = step.learning_rate, step.block_weight

    def reduce(self, machine: Machine) -> None:
        """Put the means and sums over all processes in the place of this one's."""
        waited = torch.tensor(self.data_wait_seconds, dtype=torch.float64, device=machine.device)
        bins = [torch.as_tensor(one) for one in (self._bin_errors, self._bin_counts)]
        *sums, self._bin_errors, self._bin_counts, waited = machine.sum([*self._sums.values(), *bins, waited])
        self._sums = {name: total / machine.world for name, total in zip(self._sums, sums, strict=True)}
        self.data_wait_seconds, self.samples = float(waited) / machine.world, self.samples * machine.world

    def line(self, samples: int, blocks: Sequence[str]) -> dict[str, Any]:
        """The means of the window as one line of the journal; a bin of s without a sample is null."""
        mean = {name: (total / self.steps).tolist() for name, total in self._sums.items()}
        by_bin = torch.as_tensor(self._bin_errors / self._bin_counts).tolist()
        return {
            "samples": samples,
            **{name: mean[name] for name in ("loss", "flow", "guidance")},
            "blocks": dict(zip(blocks, mean["blocks"], strict=True)),
            "lambdas": dict(zip(blocks, mean["lambdas"], strict=True)),
            "block_weight": self.block_weight,
            "flow_by_s": [None if math.isnan(error) else error for error in by_bin],
            "learning_rate": self.learning_rate,
            "grad_norm": mean["grad_norm"],
            "samples_per_second": self.samples / (time.perf_counter() - self.since),
            "data_wait_seconds": self.data_wait_seconds,
        }


class Journal:
    """`journal.jsonl` and `tensorboard/` of one run folder, taken up again at `samples`; a context that closes both.

    All processes of a run count their steps in and ask for lines together; only the main one has a file and a bar.
    """

    def __init__(self, folder: Path, samples: int, max_samples: int, blocks: Sequence[str], machine: Machine) -> None:
        self.path, self.blocks, self.window, self.machine = folder / "journal.jsonl", tuple(blocks), Window(), machine
        if not machine.is_main:
            return
        forget_after(self.path, samples)
        # Later steps of an earlier life are hidden from TensorBoard too.
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=samples + 1)
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(total=max_samples, initial=samples, unit=" samples", mininterval=interval, dynamic_ncols=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.machine.is_main:
            self._bar.close()
            self._tensorboard.close()

    def add(self, step: Step) -> None:
        """Count one step in."""
        self.window.add(step)
        if self.machine.is_main:
            self._bar.update(len(step.s) * self.machine.world)

    def write(self, samples: int, more: Mapping[str, Any] = NOTHING) -> None:
        """Write the means since the last line and `more`, if there was a step since, and begin a new window."""
        if not self.window.steps:
            return
        self.window.reduce(self.machine)
        if self.machine.is_main:
            self._write(samples, more)
        self.window = Window()

    def _write(self, samples: int, more: Mapping[str, Any]) -> None:
        line = {**self.window.line(samples, self.blocks), **more}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in flat(line):
            self._tensorboard.add_scalar(name, value, samples)
        self._bar.set_postfix(loss=f"{line['loss']:.4f}", flow=f"{line['flow']:.4f}", refresh=False)

    def pause(self) -> None:
        """Leave out of the rate what happens between two windows (a checkpoint, a grid)."""
        self.window = Window()


def forget_after(path: Path, samples: int) -> None:
    """Drop the lines beyond `samples`, and a last line that was cut off, so that no line is ever doubled."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["samples"] <= samples]
    if len(kept) < len(lines):
        atomic_write(path, "".join(kept))


def flat(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and numbers for TensorBoard: `blocks/mid`, `flow_by_s/3`."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if parts is None:
            found.append((name, value))
        else:
            found += [(f"{name}/{key}", part) for key, part in parts if part is not None]
    return [(name, value) for name, value in found if name != "samples"]
