"""All that a step of training changes, its files in a checkpoint, and the record of skipped steps and loss spikes."""

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stages.system.disk import refuse_write_errors
from stages.system.ending import is_out_of_memory
from stages.system.refusal import Refused, in_one_line
from stages.train.block_weighter import BlockWeighter
from stages.train.ema import Ema
from stages.train.journal import truncate_after
from stages.train.objective import BlockTermWeight, ObjectiveConfig
from stages.train.optimizers.muon import Muon, MuonWithAdamW, relaid
from stages.train.optimizers.partition import Partitioned

HALF_LIFE_STEPS = 64
"""Steps after which a loss counts half in the running mean and variance."""
MIN_STEPS = 32
"""Steps before anything is called a spike."""


class Anomalies:
    """Skipped steps and loss spikes: their counts and running means, and `mishaps.jsonl` of the run folder.

    A spike is a loss whose logarithm lies more than `spike_sigmas` deviations above an exponential running mean of
    those before it. It enters mean and variance clipped to that limit, so that a single spike does not hide the next,
    and a lasting rise becomes the new mean. Only the main process has a path and writes.
    """

    def __init__(self, path: Path | None = None, spike_sigmas: float = math.inf) -> None:
        self.path, self.spike_sigmas = path, spike_sigmas
        self.skipped, self.consecutive_skips, self.spikes = 0, 0, 0
        self._steps, self._mean, self._variance = 0, 0.0, 0.0

    def count_skip(self, is_consecutive: bool) -> int:
        """Count a step without a finite gradient; the number of consecutive ones, of those that count as such."""
        self.skipped += 1
        self.consecutive_skips += is_consecutive
        return self.consecutive_skips

    def add_loss(self, loss: float) -> float | None:
        """Count the loss of a completed step; the usual loss, if this one is a spike."""
        self.consecutive_skips = 0
        usual, log_loss = None, math.log(max(loss, 1e-30))
        limit = self._mean + self.spike_sigmas * math.sqrt(self._variance)
        if self._steps >= MIN_STEPS and log_loss > limit:
            self.spikes += 1
            usual, log_loss = math.exp(self._mean), limit
        # At first all steps count alike, until the exponential weight is the larger one.
        self._steps += 1
        share = max(1 / self._steps, 1 - 0.5 ** (1 / HALF_LIFE_STEPS))
        difference = log_loss - self._mean
        self._mean += share * difference
        self._variance = (1 - share) * (self._variance + share * difference * difference)
        return usual

    def write_event(self, samples: int, kind: str, keys: Sequence[str], **metrics: float) -> None:
        """Write a line about the step that ended at this sample."""
        if self.path is None:
            return
        line = {"samples": samples, "kind": kind, "keys": list(keys), **metrics}
        with refuse_write_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> Mapping[str, Any]:
        """The counts, for the journal."""
        return {"skipped": self.skipped, "spikes": self.spikes}

    def truncate_after(self, samples: int) -> None:
        """Drop the lines beyond `samples`, of a process that was killed after its last checkpoint."""
        if self.path is not None:
            truncate_after(self.path, samples)

    def state_dict(self) -> dict[str, Any]:
        """The counts and running means."""
        loss = {"steps": self._steps, "mean": self._mean, "variance": self._variance}
        return {"skipped": self.skipped, "in_a_row": self.consecutive_skips, "spikes": self.spikes, "loss": loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        counts = (int(state[name]) for name in ("skipped", "in_a_row", "spikes"))
        self.skipped, self.consecutive_skips, self.spikes = counts
        loss = state["loss"]
        self._steps, self._mean, self._variance = int(loss["steps"]), float(loss["mean"]), float(loss["variance"])


LOAD_ERRORS = (
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)
"""Raised by torch and safetensors for files with other tensors, groups or settings."""

MOMENT_NAMES = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
"""Moments of their parameter's size; those of 8 bits are packed, and checked by their own optimizer."""


@dataclass
class TrainingState:
    """All that a step changes; the same on every process, except that each may keep only its part of the moments."""

    student: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    block_term_weight: BlockTermWeight = field(default_factory=lambda: BlockTermWeight(ObjectiveConfig()))
    block_weighter: BlockWeighter = field(default_factory=BlockWeighter)
    anomalies: Anomalies = field(default_factory=Anomalies)
    scaler: torch.amp.GradScaler | None = None
    arithmetic: Mapping[str, Any] = field(default_factory=dict)
    """What changes only the last bits of a step: processes, micro-batches, layout."""
    previous_arithmetic: Mapping[str, Any] = field(default_factory=dict)
    """The same of the checkpoint that was read."""
    samples: int = 0
    _whole_moments: dict[str, Any] | None = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the main process has all moments, for `write`; entered by all processes."""
        self._whole_moments = gather_state(self.optimizer)
        try:
            yield
        finally:
            self._whole_moments = None

    def write(self, folder: Path) -> None:
        """Write everything but the number of samples into a folder; of the weights, those that are trained."""
        frozen = self._frozen()
        weights = {k: v.contiguous() for k, v in self.student.state_dict().items() if k not in frozen}
        save_file(weights, folder / "student.safetensors")
        save_file({k: v.contiguous() for k, v in self.ema.tensors().items()}, folder / "ema.safetensors")
        moments = self.optimizer.state_dict() if self._whole_moments is None else self._whole_moments
        memory = {
            "judge": self.block_weighter.state_dict(),
            "penalty": self.block_term_weight.state_dict(),
            "mishaps": self.anomalies.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "arithmetic": dict(self.arithmetic),
        }
        for name, content in (("optimizer.pt", moments), ("memory.pt", memory)):
            with open(folder / name, "wb") as handle:  # with a path, torch hides the cause of a failure
                torch.save(content, handle)

    def read(self, folder: Path, samples: int) -> None:
        """Load what `write` left in a folder, as the state after so many samples.

        Raises `Refused` for whole files with the state of another run.
        """
        try:
            self._load(folder)
        except LOAD_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise Refused(
                f"{folder}: does not fit this run ({in_one_line(error)}) - choose another run folder, or move it away"
            ) from error
        self.samples = samples

    def _load(self, folder: Path) -> None:
        device = str(next(self.student.parameters()).device)
        weights = load_file(folder / "student.safetensors", device=device)
        self.student.load_state_dict({**self._frozen(), **weights})
        self.ema.load_tensors(load_file(folder / "ema.safetensors", device=device))
        self._load_moments(folder / "optimizer.pt", device)
        memory = torch.load(folder / "memory.pt", map_location=device, weights_only=True)
        self.block_weighter.load_state_dict(memory["judge"])
        self.block_term_weight.load_state_dict(memory["penalty"])
        self.anomalies.load_state_dict(memory["mishaps"])
        if self.scaler and memory["scaler"]:
            self.scaler.load_state_dict(memory["scaler"])
        self.previous_arithmetic = memory["arithmetic"]
        before, now = (bool(each.get("channels_last")) for each in (self.previous_arithmetic, self.arithmetic))
        if before != now:
            _fit_layout(self.optimizer, before)

    def _load_moments(self, file: Path, device: str) -> None:
        """Load the moments, of which only this process's part is read where the processes share them."""
        parts = [part for part in _parts(self.optimizer).values() if isinstance(part, Partitioned)]
        is_shared = any(part.partition.group.world > 1 for part in parts)
        place: dict[str, Any] = {"map_location": "cpu", "mmap": True} if is_shared else {"map_location": device}
        content = torch.load(file, weights_only=True, **place)
        self.optimizer.load_state_dict(content)
        _check_moments(self.optimizer, content)

    def size_bytes(self) -> int:
        """About what `write` needs on the disk."""
        return checkpoint_bytes(self.student)

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.student.named_parameters() if not p.requires_grad}


def checkpoint_bytes(student: nn.Module) -> int:
    """About the size of a checkpoint: weights, average and two moments of each trained parameter."""
    return 4 * sum(p.nelement() * p.element_size() for p in student.parameters() if p.requires_grad)


def gather_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of all processes on the main one; called by all of them."""
    states = {
        name: part.gather_state() if isinstance(part, Partitioned) else part.state_dict()
        for name, part in _parts(optimizer).items()
    }
    return states if isinstance(optimizer, MuonWithAdamW) else states[""]


def _parts(optimizer: torch.optim.Optimizer) -> Mapping[str, torch.optim.Optimizer]:
    """The optimizers that have a state of their own."""
    return optimizer.optimizers if isinstance(optimizer, MuonWithAdamW) else {"": optimizer}


def _fit_layout(optimizer: torch.optim.Optimizer, was_channels_last: bool) -> None:
    """Lay the moments as their parameters lie now; fused AdamW and Muon read both in the order of memory."""
    for part in _parts(optimizer).values():
        for parameter, moments in part.state.items():
            for name in MOMENT_NAMES & moments.keys():
                if isinstance(part, Muon):
                    moments[name] = relaid(moments[name], parameter, was_channels_last)
                elif moments[name].stride() != parameter.stride():
                    moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(moments[name])


def _check_moments(optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for moments that have not their parameter's size, which torch does not check.

    Of a whole state, so that all processes raise alike.
    """
    for name, part in _parts(optimizer).items():
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        for index, moments in (content[name] if name else content)["state"].items():
            for moment in MOMENT_NAMES & moments.keys():
                if moments[moment].numel() != parameters[index].numel():
                    shapes = f"{list(moments[moment].shape)}, its parameter {list(parameters[index].shape)}"
                    raise ValueError(f"optimizer.pt: {moment} has shape {shapes}")
