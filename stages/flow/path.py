"""The linear path from data (s = 0) to noise (s = 1): x_s = (1 - s) x0 + s eps, with the velocity dx/ds = eps - x0."""

import torch
from jaxtyping import Float
from torch import Tensor


def per_sample(coefficient: Float[Tensor, " b"], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """One factor per sample, broadcast to the shape and device of `x`; half types are promoted to float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return coefficient.to(device=x.device, dtype=dtype).reshape(-1, *[1] * (x.ndim - 1))


def interpolate(
    x0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], s: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The state x_s = (1 - s) x0 + s eps."""
    return per_sample(1 - s, x0) * x0 + per_sample(s, eps) * eps
