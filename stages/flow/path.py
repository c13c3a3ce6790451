"""A path from data to noise is (alpha, sigma) and their derivatives; its velocity is the time derivative.

Everywhere s = 0 is data and s = 1 is noise. VP-v and the flow velocity are one formula on two paths.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class ProbabilityPath(Protocol):
    """What multiplies data and noise at time s, and how fast that changes."""

    def alpha(self, s: Tensor) -> Tensor: ...

    def sigma(self, s: Tensor) -> Tensor: ...

    def d_alpha(self, s: Tensor) -> Tensor: ...

    def d_sigma(self, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LinearPath:
    """The straight path x_s = (1 - s) x0 + s eps: the one coordinate used inside this house."""

    def alpha(self, s: Tensor) -> Tensor:
        return 1 - s

    def sigma(self, s: Tensor) -> Tensor:
        return s

    def d_alpha(self, s: Tensor) -> Tensor:
        return -torch.ones_like(s)

    def d_sigma(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)


@dataclass(frozen=True)
class VariancePreservingPath:
    """The variance-preserving path alpha = cos(pi s / 2), sigma = sin(pi s / 2).

    Its velocity is (pi / 2) (alpha eps - sigma x0): the network's v_prediction, times the speed of the angle.
    """

    def alpha(self, s: Tensor) -> Tensor:
        return torch.cos(s * math.pi / 2)

    def sigma(self, s: Tensor) -> Tensor:
        return torch.sin(s * math.pi / 2)

    def d_alpha(self, s: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(s)

    def d_sigma(self, s: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(s)


def per_sample(coefficient: Float[Tensor, " b"], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """One number for each sample, in the shape, type and place that multiply `x`; half types are met in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return coefficient.to(device=x.device, dtype=dtype).reshape(-1, *[1] * (x.ndim - 1))


def interpolate(
    path: ProbabilityPath, x0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], s: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The state x_s = alpha(s) x0 + sigma(s) eps."""
    return per_sample(path.alpha(s), x0) * x0 + per_sample(path.sigma(s), eps) * eps


def path_velocity(
    path: ProbabilityPath, x0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], s: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The velocity dx/ds = alpha'(s) x0 + sigma'(s) eps; on the linear path eps - x0."""
    return per_sample(path.d_alpha(s), x0) * x0 + per_sample(path.d_sigma(s), eps) * eps
