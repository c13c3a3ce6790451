"""Targets of few-step training where no landing is stored: u = v_w - (s - b) du/ds along the guided flow.

Derived from (s - b) u = integral of v_w over [b, s] by differentiating it along the flow (MeanFlow: Geng et al. 2025,
arXiv:2505.13447, equation 4). du/ds is a central difference of the student itself, without gradient.
"""

from dataclasses import replace

import torch

from shards.batch import Batch
from stages.flow.path import per_sample
from stages.flow.windows import window_ends, window_of
from stages.nets.student import Student

DIFFERENCE = 0.005
"""Half the span of the central difference: five of the thousand steps that the network was trained on."""


@torch.no_grad()
def identity_targets(student: Student, batch: Batch, windows: int) -> Batch:
    """The batch, whose rows off the trajectory hold v_w, with u by the identity as the target of these rows."""
    assert batch.trajectory is not None
    assert batch.guidance_scale is not None
    rows = (~batch.trajectory).nonzero()[:, 0]
    if not len(rows):
        return batch
    ends = window_ends(windows).to(batch.s.device, batch.s.dtype)
    x, s, v, cond, w = (part[rows] for part in (batch.x_s, batch.s, batch.v_cond, batch.cond, batch.guidance_scale))

    # u jumps where a window ends, so both points of the difference stay in this one
    window = window_of(s, ends)
    begin, end = ends[window], ends[window + 1]
    high, low = torch.minimum(s + DIFFERENCE, begin), torch.maximum(s - DIFFERENCE, (s + end) / 2)
    states = torch.cat([x + per_sample(time - s, x) * v for time in (high, low)])
    u = student.velocity(states, torch.cat([high, low]), cond.repeat(2, 1, 1), w.repeat(2))
    slope = (u[: len(rows)] - u[len(rows) :]) / per_sample(high - low, x)

    target = batch.v_cond.clone()
    target[rows] = v - per_sample(s - end, x) * slope
    return replace(batch, v_cond=target, v_uncond=target)
