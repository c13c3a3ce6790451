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
    landing_share: float
    seed: int

    def batches(self, first_sample: int) -> Iterator[Batch]:
        """This process's rows from this sample on; each is a function of its sample number alone."""
        places = (self.reader.own_samples(block) for block in self.reader.schedule.blocks(first_sample))
        for batch, samples in zip(self.reader.batches(first_sample), places, strict=False):
            yield window_batch(batch, torch.from_numpy(samples), self.windows, self.landing_share, self.seed)


def window_batch(batch: Batch, samples: Int[Tensor, " b"], windows: int, landing_share: float, seed: int) -> Batch:
    """The batch with a state of its window in each row, in fp32, and as both velocities that which lands at its end.

    A row keeps its stored state where that lies on the trajectory, but for `landing_share` of these rows; else it
    takes the landing that begins one of the windows. The choices follow from the rows' numbers `samples`.
    """
    x_landing, w, on_trajectory = _landings(batch)
    ends = window_ends(windows)
    chances = torch.tensor(
        [[derived_seed("windows", seed, part, number) / 2**63 for part in range(2)] for number in samples.tolist()]
    )
    takes_landing = ~on_trajectory | (chances[:, 0] < landing_share)
    begun = (chances[:, 1] * windows).long().clamp_max(windows - 1)

    # The ends of these windows are among those of the cache, whose landings begin with the noise and end with x0
    rows, stride = torch.arange(len(batch)), (x_landing.shape[1] - 1) // windows
    x = _where(takes_landing, x_landing[rows, begun * stride], batch.x_s).float()
    s = torch.where(takes_landing, ends[begun].float(), batch.s.clamp_max(FIRST_TIME))
    window = window_of(s, ends)
    end = ends[window + 1].float()
    u = landing_velocity(x, s, x_landing[rows, (window + 1) * stride].float(), end)

    v = apply_guidance(batch.v_cond.float(), batch.v_uncond.float(), w)
    u = _where(~takes_landing & (s - end < NEAR), v, u)
    return replace(batch, x_s=x, s=s, v_cond=u, v_uncond=u, features={}, landing_x=None, landing_s=None)


def landing_ends(batch: Batch) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """The noises that the trajectories of the rows start from, and the pictures x0 where they end, in fp32."""
    x_landing, _, _ = _landings(batch)
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
