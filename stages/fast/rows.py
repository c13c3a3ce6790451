"""Rows for training in windows: states on the teacher's trajectories, and the velocities that land on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shards.batch import Batch
from shards.reader import Reader
from stages.flow.solver import apply_guidance
from stages.flow.windows import FIRST_TIME, landing_velocity, window_ends, window_of
from stages.prompts import derived_seed

NEAR = 0.005
"""A state this near to the end of its window has the guided velocity there as its target, the limit of u: the
quotient would be that of two latents in half precision, and their rounding over so short a time is noise."""


@dataclass(frozen=True)
class WindowRows:
    """The training rows of a reader that was opened with landings, for a student of so many windows."""

    reader: Reader
    windows: int
    shares: "RowShares"
    seed: int

    def batches(self, first_sample: int) -> Iterator[Batch]:
        """This process's rows from this sample on; each is a function of its sample number alone."""
        places = (self.reader.own_samples(block) for block in self.reader.schedule.blocks(first_sample))
        for batch, samples in zip(self.reader.batches(first_sample), places, strict=False):
            yield window_batch(batch, torch.from_numpy(samples), self.windows, self.shares, self.seed)


@dataclass(frozen=True)
class RowShares:
    """Which rows keep their own state, where the cache has landings to begin at instead."""

    landing: float
    """share of the rows on a trajectory that begin at a window"""
    identity: float = 0
    """share of the others that keep their state; the rest of them begins at a window"""


def window_batch(batch: Batch, samples: Int[Tensor, " b"], windows: int, shares: RowShares, seed: int) -> Batch:
    """The batch with a state of its window in each row, in fp32, and as both velocities that which lands at its end.

    A row has its own state or the landing that begins one of the windows, by `shares`; the choices follow from the
    rows' numbers `samples`. Where it is not stored where a row's trajectory leaves the window, its velocities are the
    guided one at its state and `trajectory` is False: `identity_targets` makes the target of it.
    """
    x_landing, w, on_trajectory = _landings(batch)
    inner = x_landing.shape[1] - 1
    ends = window_ends(windows)
    chances = torch.tensor(
        [[derived_seed("windows", seed, part, number) / 2**63 for part in range(2)] for number in samples.tolist()]
    )
    takes_landing = torch.where(on_trajectory, chances[:, 0] < shares.landing, chances[:, 0] >= shares.identity)
    takes_landing &= inner > 0
    begun = (chances[:, 1] * windows).long().clamp_max(windows - 1)

    # The ends of these windows are among those of the cache, whose landings begin with the noise and end with x0
    rows, stride = torch.arange(len(batch)), inner // windows
    x = _where(takes_landing, x_landing[rows, begun * stride], batch.x_s).float()
    s = torch.where(takes_landing, ends[begun].float(), batch.s.clamp_max(FIRST_TIME))
    window = window_of(s, ends)
    end = ends[window + 1].float()
    u = landing_velocity(x, s, x_landing[rows, (window + 1) * stride].float(), end)

    # Without landings x0 is known, where the last window ends
    lands = takes_landing | (on_trajectory & ((window == windows - 1) | (inner > 0)))
    v = apply_guidance(batch.v_cond.float(), batch.v_uncond.float(), w)
    u = _where(~lands | (~takes_landing & (s - end < NEAR)), v, u)
    targets = {"x_s": x, "s": s, "v_cond": u, "v_uncond": u, "trajectory": lands}
    return replace(batch, **targets, features={}, landing_x=None, landing_s=None)  # type: ignore[arg-type]


def landing_ends(batch: Batch) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]] | None:
    """The noises that the trajectories of the rows start from, and the pictures x0 where they end, in fp32.

    None where the cache has no landings.
    """
    x_landing, _, _ = _landings(batch)
    if x_landing.shape[1] == 1:
        return None
    return x_landing[:, 0].float(), x_landing[:, -1].float()


def _where(
    mask: Bool[Tensor, " b"], chosen: Float[Tensor, "b ..."], other: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """The rows of `chosen` where the mask says so, else those of `other`."""
    return torch.where(mask.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, other)


def _landings(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The landings, guidance scales and places of a batch, which a reader opened with landings fills."""
    assert batch.landing_x is not None
    assert batch.guidance_scale is not None
    assert batch.trajectory is not None
    return batch.landing_x, batch.guidance_scale, batch.trajectory
