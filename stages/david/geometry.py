"""Volumes of simplices, where a point lies to one, the Cantor staircase, and the role-weighted score.

All of it is worked out in float64, whatever comes in; gradients are finite everywhere.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ROLE_WEIGHTS = (1.0, -0.75, 0.75, 0.75, -0.75)
"""Weights of a pentachoron's five vertices: anchor, need, relation, purpose, observer; they sum to one."""

FLAT_BELOW = 1e-13
"""A squared volume below this, at a mean squared edge of one, is rounding: the simplex is flat."""


def squared_distances(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "... m m"]:
    """|v_i - v_j|^2, from differences: close vertices lose no digits."""
    return (vertices[..., :, None, :] - vertices[..., None, :, :]).square().sum(-1)


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

    # The determinant of a singular matrix has no gradient that can be trusted: flat ones are replaced before.
    flat = factor * torch.linalg.det(bordered.detach()) < FLAT_BELOW
    regular = 1 - torch.eye(m + 1, dtype=bordered.dtype, device=bordered.device)
    squared = factor * torch.linalg.det(torch.where(flat[..., None, None], regular, bordered))
    return torch.where(flat, 0.0, squared.sqrt() * scale ** ((m - 1) / 2))


def gram_volume(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "..."]:
    """The same volume from the k = m - 1 edges at the first vertex: V = sqrt(det(E E^T)) / k!."""
    spokes = (vertices[..., 1:, :] - vertices[..., :1, :]).double()
    return _safe_sqrt(torch.linalg.det(spokes @ spokes.mT)) / math.factorial(spokes.shape[-2])


def inclusion_ratio_by_volumes(z: Float[Tensor, "... d"], vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "..."]:
    """Inclusion ratio of a point by its definition: c(z) = V / sum_i V_i, with vertex i replaced by z in V_i.

    In (0, 1]: 1 just where z lies in the simplex, 0 far away, the same for any rigid motion and scale.
    """
    m = vertices.shape[-2]
    replaced = torch.where(
        torch.eye(m, dtype=torch.bool, device=z.device)[..., None], z[..., None, None, :], vertices[..., None, :, :]
    )
    return cayley_menger_volume(vertices) / cayley_menger_volume(replaced).sum(-1)


def barycentric_gradients(vertices: Float[Tensor, "... m d"]) -> Float[Tensor, "... m d"]:
    """Gradients g_i of the barycentric coordinates within the simplex: rows of (E E^T)^-1 E, and g_0 = -sum_i g_i."""
    spokes = (vertices[..., 1:, :] - vertices[..., :1, :]).double()
    rows = torch.linalg.solve(spokes @ spokes.mT, spokes)
    return torch.cat([-rows.sum(-2, keepdim=True), rows], dim=-2)


def inclusion_ratio(
    z: Float[Tensor, "... d"], vertices: Float[Tensor, "... m d"], gradients: Float[Tensor, "... m d"]
) -> Float[Tensor, "..."]:
    """The same ratio in closed form, without a determinant for each point; `gradients` are the simplex's `duals`.

    c(z) = 1 / sum_i sqrt(b_i^2 + r^2 |g_i|^2)
    b: barycentric coordinates of the foot of z in the simplex's own space, r: the distance between the two
    """
    vertices = vertices.double()
    from_first = z.double() - vertices[..., 0, :]
    b = (gradients * from_first[..., None, :]).sum(-1)
    b = torch.cat([1 + b[..., :1], b[..., 1:]], dim=-1)
    spokes = vertices[..., 1:, :] - vertices[..., :1, :]
    off = from_first - (b[..., 1:, None] * spokes).sum(-2)
    distance_squared = off.square().sum(-1, keepdim=True)
    return 1 / _safe_sqrt(b.square() + distance_squared * gradients.square().sum(-1)).sum(-1).clamp_min(1)


def cantor_staircase(x: Float[Tensor, "..."], alpha: float = 0.5, levels: int = 20) -> Float[Tensor, "..."]:
    """De Rham's staircase F on [0, 1], sample by sample: monotone, continuous, F(0) = 0, F(1) = 1.

    F(x) = a F(3x) up to 1/3, a up to 2/3, a + (1 - a) F(3x - 2) beyond; after `levels` of them a straight line.
    """
    x = x.double().clamp(0, 1)
    below, share = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(levels):
        left, right = 3 * x < 1, 3 * x > 2
        below = torch.where(left, below, below + alpha * share)
        share = torch.where(left, alpha * share, torch.where(right, (1 - alpha) * share, 0.0))
        x = torch.where(left, 3 * x, torch.where(right, 3 * x - 2, 0.0))
    return below + share * x


def cantor_position(
    bins: Int[Tensor, " b"], count: int, lean: Float[Tensor, " b"], reach: float = 0.3
) -> Float[Tensor, " b"]:
    """Where a sample stands on the staircase: its bin's middle, moved by its features; no batch mate moves it.

    x = clip((bin + 1/2) / T + reach tanh(lean), 0, 1),  lean = w.z + c
    """
    return ((bins + 0.5) / count + reach * lean.tanh()).clamp(0, 1)


def role_directions(vertices: Float[Tensor, "K 5 d"]) -> Float[Tensor, "K d"]:
    """u_k = sum_v r_v v_kv / |v_kv|: the role-weighted (Rose) score sum_v r_v cos(z, v_kv) is z.u_k for a unit z."""
    roles = torch.tensor(ROLE_WEIGHTS, dtype=vertices.dtype, device=vertices.device)
    return (roles[:, None] * F.normalize(vertices, dim=-1)).sum(-2)


def rose_score(z: Float[Tensor, "b d"], vertices: Float[Tensor, "K 5 d"]) -> Float[Tensor, "b K"]:
    """Role-weighted score of unit vectors z against each pentachoron: s_k = sum_v r_v cos(z, v_kv) = z.u_k."""
    return z @ role_directions(vertices).mT


def _normalised_distances(vertices: Float[Tensor, "... m d"]) -> tuple[Float[Tensor, "... m m"], Float[Tensor, "..."]]:
    """Squared distances over their mean, which is the scale; so no size of a simplex is small or large."""
    distances = squared_distances(vertices)
    m = vertices.shape[-2]
    scale = distances.sum((-1, -2)) / (m * (m - 1))
    scale = torch.where(scale > 0, scale, 1.0)
    return distances / scale[..., None, None], scale


def _safe_sqrt(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Square root, with the gradient 0 where it is 0 instead of an infinite one."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
