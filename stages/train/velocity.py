"""How far a student's velocities are from its teacher's, in all and in each bin of s."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from shards.reader import Reader
from stages.flow.timesteps import bin_of
from stages.nets.student import Student

BINS = 5
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class RelativeError:
    """sum |v - v*|^2 / sum |v*|^2 over all states, and over those of each bin of s (None for an empty bin)."""

    overall: float
    by_bin: tuple[float | None, ...]


@dataclass(frozen=True)
class VelocityErrors:
    """Errors of the velocity, both branches together, and of the guidance difference v_cond - v_uncond."""

    velocity: RelativeError
    guidance: RelativeError
    states: int


class _Sums:
    """Squared errors and squared targets, added up in each bin in float64."""

    def __init__(self, bins: int) -> None:
        self.error, self.target = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)

    def add(self, bin_index: Tensor, v: Float[Tensor, "b ..."], v_star: Float[Tensor, "b ..."]) -> None:
        wrong = (v.float() - v_star.float()).square().flatten(1).sum(1, dtype=torch.float64)
        whole = v_star.float().square().flatten(1).sum(1, dtype=torch.float64)
        self.error.index_add_(0, bin_index.cpu(), wrong.cpu())
        self.target.index_add_(0, bin_index.cpu(), whole.cpu())

    def ratio(self) -> RelativeError:
        by_bin = [float(e / t) if t > 0 else None for e, t in zip(self.error, self.target, strict=True)]
        return RelativeError(float(self.error.sum() / self.target.sum()), tuple(by_bin))


@torch.inference_mode()
def velocity_errors(
    student: Student, batches: Iterable[Batch], uncond: Float[Tensor, "1 l d"], bins: int = BINS
) -> VelocityErrors:
    """The student against the cached answers of its teacher."""
    velocity, guidance, states = _Sums(bins), _Sums(bins), 0
    for batch in batches:
        batch = batch.to(uncond.device, torch.float32)
        out, where = student(batch.x_t, batch.s, batch.cond, uncond), bin_of(batch.s, bins)
        velocity.add(where, out.v_cond, batch.v_cond)
        velocity.add(where, out.v_uncond, batch.v_uncond)
        guidance.add(where, out.v_cond - out.v_uncond, batch.v_cond - batch.v_uncond)
        states += len(batch.keys)
    return VelocityErrors(velocity.ratio(), guidance.ratio(), states)


def held_out(reader: Reader, most: int, rows: int = ROWS_AT_ONCE) -> Iterator[Batch]:
    """The first states of a split, each once: up to so many, or all of them."""
    count = min(most, reader.samples_per_epoch)
    for first in range(0, count, rows):
        yield reader.batch(np.arange(first, min(first + rows, count)))
