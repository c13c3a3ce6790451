"""Volumes of simplices, inclusion ratios of points, and the role-weighted score of pentachora.

Volumes and ratios are computed in float64 whatever the input; gradients are finite everywhere.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ROLE_WEIGHTS = (1.0, -0.75, 0.75, 0.75, -0.75)
"""Weights of a pentachoron's five vertices, anchor, need, relation, purpose, observer; they sum to one."""

FLAT_BELOW = 1e-13
"""A squared volume below this, at a mean squared edge of one, is rounding: the simplex is flat."""


def edge_lengths(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "... e"]:
    """The lengths of the m (m - 1) / 2 edges."""
    rows, columns = torch.triu_indices(vertices.shape[-2], vertices.shape[-2], offset=1)
    return _safe_sqrt((vertices[..., rows, :] - vertices[..., columns, :]).square().sum(-1))


def cayley_menger_volume(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "..."]:
    """Volume of the simplex on m = k + 1 vertices; a flat one has the volume 0 and the gradient 0.

    V^2 = (-1)^(k+1) / (2^k (k!)^2) det [[0, 1], [1, D]],  D_ij = |v_i - v_j|^2
    """
    m = vertices.shape[-2]
    distances, scale = _normalised_distances(vertices.double())
    bordered = F.pad(distances, (1, 0, 1, 0), value=1.0)
    bordered[..., 0, 0] = 0
    factor = (-1) ** m / (2 ** (m - 1) * math.factorial(m - 1) ** 2)

    # The gradient of a singular matrix's determinant is unreliable: flat simplices are replaced first.
    flat = factor * torch.linalg.det(bordered.detach()) < FLAT_BELOW
    regular = 1 - torch.eye(m + 1, dtype=bordered.dtype, device=bordered.device)
    squared = factor * torch.linalg.det(torch.where(flat[..., None, None], regular, bordered))
    return torch.where(flat, 0.0, squared.sqrt() * scale ** ((m - 1) / 2))


def barycentric_gradients(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "... m d"]:
    """Gradients g_i of the barycentric coordinates within the simplex: rows of (E E^T)^-1 E, and g_0 = -sum_i g_i."""
    spokes = (vertices[..., 1:, :] - vertices[..., :1, :]).double()
    rows = torch.linalg.solve(spokes @ spokes.mT, spokes)
    return torch.cat([-rows.sum(-2, keepdim=True), rows], dim=-2)


def inclusion_ratio(
    z: Float[Tensor, "... d"], vertices: Float[Tensor, "... m d"], gradients: Float[Tensor, "... m d"]
) -> Float[Tensor, "..."]:
    """Inclusion ratio c(z) = V / sum_i V_i, with vertex i replaced by z in V_i; `gradients` are the barycentric g_i.

    In (0, 1]: 1 just where z lies in the simplex, 0 far away, invariant under rigid motions and scale. In closed form
    c(z) = 1 / sum_i sqrt(b_i^2 + r^2 |g_i|^2), with b the barycentric coordinates of the foot of z in the simplex's own
    space and r the distance between the two.
    """
    vertices = vertices.double()
    from_first = z.double() - vertices[..., 0, :]
    b = (gradients * from_first[..., None, :]).sum(-1)
    b = torch.cat([1 + b[..., :1], b[..., 1:]], dim=-1)
    spokes = vertices[..., 1:, :] - vertices[..., :1, :]
    off = from_first - (b[..., 1:, None] * spokes).sum(-2)
    distance_squared = off.square().sum(-1, keepdim=True)
    return 1 / _safe_sqrt(b.square() + distance_squared * gradients.square().sum(-1)).sum(-1).clamp_min(1)


def role_directions(vertices: Float[Tensor, "K 5 d"]) -> Float[Tensor, "K d"]:
    """u_k = sum_v r_v v_kv / |v_kv|: the role-weighted (Rose) score sum_v r_v cos(z, v_kv) is z.u_k for a unit z."""
    roles = torch.tensor(ROLE_WEIGHTS, dtype=vertices.dtype, device=vertices.device)
    return (roles[:, None] * F.normalize(vertices, dim=-1)).sum(-2)


def _normalised_distances(vertices: Float[Tensor, "... m d"]) -> tuple[Float[Tensor, "... m m"], Float[Tensor, "..."]]:
    """|v_i - v_j|^2 over their mean, and that mean: the scale of a simplex does not matter then."""
    distances = (vertices[..., :, None, :] - vertices[..., None, :, :]).square().sum(-1)  # exact for close vertices
    m = vertices.shape[-2]
    scale = distances.sum((-1, -2)) / (m * (m - 1))
    scale = torch.where(scale > 0, scale, 1.0)
    return distances / scale[..., None, None], scale


def _safe_sqrt(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Square root with the gradient 0, not infinity, at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
