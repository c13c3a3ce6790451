"""Where a point lies in a pentachoron."""

import torch
from jaxtyping import Float
from torch import Tensor


def inclusion(z: Float[Tensor, "b d"], vertices: Float[Tensor, "b 5 d"]) -> Float[Tensor, " b"]:
    """Inclusion ratio in (0, 1]: 1 if and only if z lies in the pentachoron, towards 0 far away.

    c(z) = Vol(V) / sum_i Vol(V with vertex i replaced by z) = 1 / sum_i sqrt(b_i^2 + r^2 |g_i|^2), where g_i are the
    gradients of the barycentric coordinates b_i and r is the distance of z from the flat of the vertices.
    """
    edges = vertices[:, 1:] - vertices[:, :1]
    gradients = torch.linalg.solve(edges @ edges.mT, edges)
    gradients = torch.cat([-gradients.sum(dim=1, keepdim=True), gradients], dim=1)
    offset = z - vertices[:, 0]
    inner = (gradients[:, 1:] @ offset[:, :, None]).squeeze(2)
    barycentric = torch.cat([1 - inner.sum(dim=1, keepdim=True), inner], dim=1)
    distance_squared = (offset - (inner[:, None] @ edges).squeeze(1)).square().sum(dim=1)
    terms = barycentric.square() + distance_squared[:, None] * gradients.square().sum(dim=2)
    return 1 / terms.sqrt().sum(dim=1)
