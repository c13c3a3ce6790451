"""The windows of few-step sampling: in each of them one Euler step takes the place of many (mathematics, section 7).

Times fall from noise to data: b_0 > b_1 > ... > b_N = 0, and window i reaches from b_i down to b_{i+1}.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.flow.path import per_sample
from stages.flow.timesteps import shift_time

FIRST_TIME = 0.999
"""Where stock samplers begin, whose first of 1000 steps is number 999; they take pure noise for the state there."""


def window_ends(windows: int, shift: float = 1.0) -> Float[Tensor, " n+1"]:
    """The n + 1 ends b_0 ... b_n of n windows in float64: the times of n steps of stock samplers, the last one 0.

    Those of n windows are among those of 2 n.
    """
    share = torch.arange(windows, -1, -1, dtype=torch.float64) / windows
    return shift_time(FIRST_TIME * share, shift)


def window_of(s: Float[Tensor, " b"], ends: Float[Tensor, " n+1"]) -> Int[Tensor, " b"]:
    """The number i of the window that is left from s: b_i >= s > b_{i+1}; 0 for times above b_0."""
    lower = ends[1:].to(s.device, s.dtype)
    return (s[:, None] <= lower).sum(1).clamp_max(len(lower) - 1)


def landing_velocity(
    x_s: Float[Tensor, "b ..."], s: Float[Tensor, " b"], x_end: Float[Tensor, "b ..."], end: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """u = (x_s - x_end) / (s - end): one Euler step of u from s to the window's end lands on x_end."""
    return (x_s - x_end) / per_sample(s - end, x_s)
