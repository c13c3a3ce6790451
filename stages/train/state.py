"""All that a step of training changes, and the files of a checkpoint that hold it."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from configs.last_resort import is_for_memory
from configs.refusal import Refused, in_one_line
from stages.train.ema import Ema
from stages.train.judge import Judge, Nobody
from stages.train.mishaps import Mishaps
from stages.train.muon import MuonWithAdamW
from stages.train.objective import ObjectiveConfig
from stages.train.penalty import Penalty

UNFIT = (
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)
"""What files of other tensors, groups or settings make torch and safetensors raise."""

MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
"""As many numbers as their parameter has; what 8 bits hold is packed, and judged by its own optimizer."""


@dataclass
class TrainingState:
    """All that a step changes."""

    student: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    penalty: Penalty = field(default_factory=lambda: Penalty(ObjectiveConfig()))
    judge: Judge = field(default_factory=Nobody)
    mishaps: Mishaps = field(default_factory=Mishaps)
    scaler: torch.amp.GradScaler | None = None
    arithmetic: Mapping[str, Any] = field(default_factory=dict)
    """What moves the last bits of a step and nothing else: processes, micro-batches, layout."""
    inherited: Mapping[str, Any] = field(default_factory=dict)
    """The same of whoever wrote the checkpoint that was read."""
    samples: int = 0

    def write(self, folder: Path) -> None:
        """Write everything but the number of samples into a folder: weights, average, optimizer, memory.

        Weights that are not trained stay out: they are as they were at the beginning.
        """
        frozen = self._frozen()
        weights = {k: v.contiguous() for k, v in self.student.state_dict().items() if k not in frozen}
        save_file(weights, folder / "student.safetensors")
        save_file({k: v.contiguous() for k, v in self.ema.tensors().items()}, folder / "ema.safetensors")
        memory = {
            "judge": self.judge.state_dict(),
            "penalty": self.penalty.state_dict(),
            "mishaps": self.mishaps.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "arithmetic": dict(self.arithmetic),
        }
        for name, content in (("optimizer.pt", self.optimizer.state_dict()), ("memory.pt", memory)):
            with open(folder / name, "wb") as handle:  # given a path, torch hides why it failed
                torch.save(content, handle)

    def read(self, folder: Path, samples: int) -> None:
        """Take over what `write` left in a folder, as the state after so many samples.

        Raises `Refused` for files that are whole and hold the state of another run.
        """
        try:
            self._take(folder)
        except UNFIT as error:
            if is_for_memory(error):
                raise
            raise Refused(
                f"{folder}: does not fit this run ({in_one_line(error)}) - choose another run folder, or move it away"
            ) from error
        self.samples = samples

    def _take(self, folder: Path) -> None:
        device = str(next(self.student.parameters()).device)
        weights = load_file(folder / "student.safetensors", device=device)
        self.student.load_state_dict({**self._frozen(), **weights})
        self.ema.restore(load_file(folder / "ema.safetensors", device=device))
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
        _check_moments(self.optimizer)
        memory = torch.load(folder / "memory.pt", map_location=device, weights_only=True)
        self.judge.load_state_dict(memory["judge"])
        self.penalty.load_state_dict(memory["penalty"])
        self.mishaps.load_state_dict(memory["mishaps"])
        if self.scaler and memory["scaler"]:
            self.scaler.load_state_dict(memory["scaler"])
        self.inherited = memory["arithmetic"]

    def bytes(self) -> int:
        """About what `write` needs."""
        return checkpoint_bytes(self.student)

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.student.named_parameters() if not p.requires_grad}


def checkpoint_bytes(student: nn.Module) -> int:
    """About what a checkpoint needs: weights, average and two moments of each parameter that is trained."""
    return 4 * sum(p.nelement() * p.element_size() for p in student.parameters() if p.requires_grad)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` for moments that are not of their parameter's size, which torch takes as they come."""
    held = optimizer.parts if isinstance(optimizer, MuonWithAdamW) else (optimizer,)
    for parameter, moments in chain.from_iterable(one.state.items() for one in held):
        for name in MOMENTS & moments.keys():
            if moments[name].numel() != parameter.numel():
                shapes = f"{list(moments[name].shape)}, its parameter {list(parameter.shape)}"
                raise ValueError(f"optimizer.pt: {name} has shape {shapes}")
