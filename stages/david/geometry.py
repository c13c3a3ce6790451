"""Where a point lies in a pentachoron."""

import torch
from jaxtyping import Float
from torch import Tensor


def duals(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "... m d"]:
    """Gradients of the barycentric coordinates, in float64; their sum is 0."""
    spokes = (vertices[..., 1:, :] - vertices[..., :1, :]).double()
    others = torch.linalg.solve(spokes @ spokes.mT, spokes)
    return torch.cat([-others.sum(dim=-2, keepdim=True), others], dim=-2)


def inclusion(
    z: Float[Tensor, "... d"], vertices: Float[Tensor, "... m d"], gradients: Float[Tensor, "... m d"]
) -> Float[Tensor, "..."]:
    """Inclusion ratio in (0, 1]: 1 if and only if z lies in the simplex, towards 0 far away; `gradients`: its `duals`.

    c(z) = Vol(V) / sum_i Vol(V with vertex i replaced by z) = 1 / sum_i sqrt(b_i^2 + r^2 |g_i|^2)
    """
    vertices = vertices.double()
    offset = z.double() - vertices[..., 0, :]
    b = (gradients * offset[..., None, :]).sum(dim=-1)
    off = offset - (b[..., None] * vertices).sum(dim=-2) + b.sum(dim=-1, keepdim=True) * vertices[..., 0, :]
    distance_squared = off.square().sum(dim=-1, keepdim=True)
    b = torch.cat([1 + b[..., :1], b[..., 1:]], dim=-1)
    return 1 / (b.square() + distance_squared * gradients.square().sum(dim=-1)).sqrt().sum(dim=-1).clamp_min(1)
