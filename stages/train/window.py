"""What the steps between two lines of the journal add up to; the sums of several processes add up likewise."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.flow.timesteps import bin_of
from stages.train.objective import Losses

BINS = 10
NAMES_BY_S = ("flow_by_s", "guidance_by_s", "blocks_by_s")


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
    group: Int[Tensor, " b"] | None = None
    """which group of the journal's each sample belongs to"""


class Window:
    """Sums over the steps since the last line; tensors stay on their device until they are asked for."""

    def __init__(self, groups: Sequence[str] = ()) -> None:
        """`groups` are told apart; samples that have none are not counted among them."""
        self.groups = tuple(groups)
        self.steps, self.data_wait_seconds, self.bookkeeping_seconds = 0, 0.0, 0.0
        self.since = time.perf_counter()
        self._sums: dict[str, Tensor] = {}

    def add(self, step: Step) -> None:
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

    def line(self, samples: int, blocks: Sequence[str], sums: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The means of the window as one line of the journal; a bin of s without a sample is null.

        `sums` are those of all processes together, where there are several. Errors by bin are means over samples,
        before omega and w(s), the blocks' being sum_b lambda_b e_b; everything else is the mean over the steps.
        """
        total = {name: value.cpu() for name, value in (sums or self.sums()).items()}
        mean = {name: (value / total["steps"]).tolist() for name, value in total.items()}
        count, *errors, omega, square = total["by_bin"]
        seconds = time.perf_counter() - self.since
        by_bin = {name: _numbers(error / count) for name, error in zip(NAMES_BY_S, errors, strict=True)}
        return {
            "samples": samples,
            **{name: mean[name] for name in ("loss", "flow", "guidance", "block_term")},
            "blocks": dict(zip(blocks, mean["blocks"], strict=True)),
            "lambdas": dict(zip(blocks, mean["lambdas"], strict=True)),
            "block_weight": self.block_weight,
            **by_bin,
            **self._told_by_group(total),
            "effective_size": float(omega.sum() ** 2 / (count.sum() * square.sum())),
            "effective_size_by_s": _numbers(omega**2 / (count * square)),
            "learning_rate": self.learning_rate,
            "grad_norm": mean["grad_norm"],
            "samples_per_second": float(count.sum()) / seconds,
            "window_seconds": seconds,
            **{name: float(total[name] / total["processes"]) for name in ("data_wait_seconds", "bookkeeping_seconds")},
        }

    def _told_by_group(self, total: Mapping[str, Tensor]) -> dict[str, Any]:
        if not self.groups:
            return {}
        count, error = total["by_group"]
        return {"flow_by_class": dict(zip(self.groups, _numbers(error / count), strict=True))}


def _parts(step: Step) -> dict[str, Tensor]:
    """The summands of one step; `by_bin` holds, by bin of s: samples, three errors, omega and its square."""
    losses, lambdas = step.losses, step.lambdas
    block_term = (lambdas[:, None] * losses.block_errors).sum(dim=0)
    ones = torch.ones_like(losses.flow_errors)
    rows = (ones, losses.flow_errors, losses.guidance_errors, block_term, losses.omega, losses.omega**2)
    stacked = torch.stack(rows).double()
    return {
        "loss": losses.total.detach(),
        "flow": losses.flow,
        "guidance": losses.guidance,
        "block_term": (lambdas * losses.blocks).sum(),
        "blocks": losses.blocks,
        "lambdas": lambdas,
        "grad_norm": step.grad_norm,
        "by_bin": stacked.new_zeros(len(rows), BINS).index_add_(1, bin_of(step.s, BINS), stacked),
    }


def _numbers(values: Float[Tensor, " n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _by_group(step: Step, groups: int) -> Float[Tensor, "2 groups"]:
    """Samples and flow errors of each group."""
    errors = step.losses.flow_errors.double()
    sums = errors.new_zeros(2, groups)
    stacked = torch.stack([torch.ones_like(errors), errors])
    return sums if step.group is None else sums.index_add_(1, step.group, stacked)
