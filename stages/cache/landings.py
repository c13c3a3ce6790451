"""Landings: the values of the teacher's guided trajectories where the windows of few-step sampling begin and end."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shards.record import Landings
from stages.cache.teacher_states import TeacherState
from stages.flow.path import per_sample
from stages.flow.solver import apply_guidance
from stages.flow.windows import window_ends


def landing_times(windows: int) -> Float[Tensor, " m"]:
    """The times of the landings, in float64: 1, where the trajectory starts, then the inner ends of the windows."""
    return torch.cat([torch.ones(1, dtype=torch.float64), window_ends(windows)[1:-1]])


def stack_landings(
    trajectory: Sequence[TeacherState], scale: Float[Tensor, " b"], windows: int | None
) -> list[Landings] | None:
    """The landings of each of b guided samplings, as they are stored; None without windows."""
    if not windows:
        return None
    times = landing_times(windows)
    s, x_s = (torch.stack(values) for values in ([one.s for one in trajectory], [one.x_s for one in trajectory]))
    predictions = [one.prediction for one in trajectory]
    v = torch.stack([apply_guidance(one.v_cond, one.v_uncond, scale) for one in predictions])
    x = torch.stack([value_at(time, s, x_s, v) for time in times.tolist()], dim=1).half().cpu()
    return [Landings(times.float(), of_prompt) for of_prompt in x]


def value_at(
    time: float, s: Float[Tensor, "n b"], x_s: Float[Tensor, "n b ..."], v: Float[Tensor, "n b ..."]
) -> Float[Tensor, "b ..."]:
    """The values at one time of b samplings by Euler's method with the states x_s and velocities v at falling times s.

    Between two states a sampling goes along a line, so this takes no call of a network: x_i + (time - s_i) v_i of the
    last state with s_i >= time, a step of the sampling cut short.
    """
    before = (s >= time).sum(dim=0) - 1
    own = (before, torch.arange(s.shape[1], device=s.device))
    s_i, x_i, v_i = s[own].double(), x_s[own], v[own]
    return x_i + per_sample(time - s_i, x_i) * v_i
