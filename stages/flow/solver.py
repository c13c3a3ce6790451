"""Solvers of dx/ds = v(x, s) from noise at s = 1 to data at s = 0, and guidance."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from stages.flow.path import per_sample
from stages.flow.timesteps import shift_time

VelocityField: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""v(x [b ...], s [b] float64) -> [b ...]."""


def uniform_grid(n: int, shift: float = 1.0) -> Float[Tensor, " n+1"]:
    """The n + 1 times of n steps from s = 1 to s = 0 inclusive, in float64; shift > 1 puts more of them near noise."""
    return shift_time(torch.linspace(1, 0, n + 1, dtype=torch.float64), shift)


def apply_guidance(
    v_cond: Float[Tensor, "b ..."], v_uncond: Float[Tensor, "b ..."], w: float | Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Classifier-free guidance: v_uncond + w (v_cond - v_uncond); w = 1 is the conditional branch."""
    scale = per_sample(w, v_cond) if isinstance(w, Tensor) else w
    return v_uncond + scale * (v_cond - v_uncond)


def remove_guidance(
    v_guided: Float[Tensor, "b ..."], v_uncond: Float[Tensor, "b ..."], w: float | Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The inverse of `apply_guidance`: the conditional velocity v_uncond + (v_guided - v_uncond) / w."""
    return apply_guidance(v_guided, v_uncond, 1 / w)


def expand_time(s: float, x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The one time s for each sample of x, in float64."""
    return torch.full((x.shape[0],), s, dtype=torch.float64, device=x.device)


def euler(velocity: VelocityField, x: Float[Tensor, "b ..."], grid: Iterable[float] | Tensor) -> Float[Tensor, "b ..."]:
    """Euler's method, order 1: one call of the velocity a step, along the times of `grid` in their order."""
    for s, s_next in _step_pairs(grid):
        x = x + (s_next - s) * velocity(x, expand_time(s, x))
    return x


def heun(velocity: VelocityField, x: Float[Tensor, "b ..."], grid: Iterable[float] | Tensor) -> Float[Tensor, "b ..."]:
    """Heun's method, order 2: two calls of the velocity a step, along the times of `grid` in their order."""
    for s, s_next in _step_pairs(grid):
        v = velocity(x, expand_time(s, x))
        v_next = velocity(x + (s_next - s) * v, expand_time(s_next, x))
        x = x + (s_next - s) * (v + v_next) / 2
    return x


def _step_pairs(grid: Iterable[float] | Tensor) -> list[tuple[float, float]]:
    return list(pairwise(float(s) for s in grid))
