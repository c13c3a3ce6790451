"""Laws of volumes, of inclusion and of the role-weighted score; why the published staircase is not used."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stages.david.geometry import (
    ROLE_WEIGHTS,
    barycentric_gradients,
    cayley_menger_volume,
    inclusion_ratio,
    role_directions,
)

GENERATOR = torch.Generator().manual_seed(0)
PENTACHORA = F.normalize(torch.randn(6, 5, 7, generator=GENERATOR, dtype=torch.float64), dim=-1)
POINTS = torch.randn(6, 7, generator=GENERATOR, dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.randn(7, 7, generator=GENERATOR, dtype=torch.float64))[0]
FLAT = {
    "one point": torch.ones(5, 3),
    "a line": torch.arange(5.0)[:, None] * torch.randn(1, 8, generator=GENERATOR),
    "a space of three dimensions": torch.randn(5, 3, generator=GENERATOR),
    "two equal vertices": torch.randn(4, 6, generator=GENERATOR)[[0, 0, 1, 2, 3]],
}


def gram_volume(vertices):
    """The volume from the k = m - 1 edges at the first vertex: V = sqrt(det(E E^T)) / k!."""
    edges = vertices[..., 1:, :] - vertices[..., :1, :]
    return torch.linalg.det(edges @ edges.mT).sqrt() / math.factorial(edges.shape[-2])


def inclusion_ratio_by_volumes(z, vertices):
    """By its definition: c(z) = V / sum_i V_i, with vertex i replaced by z in V_i."""
    at = torch.eye(vertices.shape[-2], dtype=torch.bool)[..., None]
    replaced = torch.where(at, z[..., None, None, :], vertices[..., None, :, :])
    return cayley_menger_volume(vertices) / cayley_menger_volume(replaced).sum(-1)


def included(z, vertices):
    return inclusion_ratio(z, vertices, barycentric_gradients(vertices))


def test_the_regular_unit_pentachoron_has_its_known_volume():
    vertices = torch.eye(5, dtype=torch.float64) / math.sqrt(2)
    assert cayley_menger_volume(vertices).item() == pytest.approx(math.sqrt(5) / 96, rel=1e-12)


@pytest.mark.parametrize("vertices", [2, 3, 4, 5])
def test_cayley_menger_and_gram_agree(vertices):
    simplices = PENTACHORA[:, :vertices]
    torch.testing.assert_close(cayley_menger_volume(simplices), gram_volume(simplices))


@pytest.mark.parametrize("size", [1e-12, 0.5, 1e20])
def test_a_volume_grows_with_the_fourth_power_of_the_size(size):
    torch.testing.assert_close(cayley_menger_volume(size * PENTACHORA), size**4 * cayley_menger_volume(PENTACHORA))


def test_a_volume_survives_a_rigid_motion():
    moved = PENTACHORA @ ROTATION + POINTS[0]
    torch.testing.assert_close(cayley_menger_volume(moved), cayley_menger_volume(PENTACHORA))


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_simplex_has_no_volume_and_a_gradient_of_zero(name):
    vertices = FLAT[name].clone().requires_grad_()
    volume = cayley_menger_volume(vertices)
    volume.backward()
    assert volume.item() == 0
    assert vertices.grad.count_nonzero() == 0


def test_a_volume_has_the_gradient_of_its_differences():
    assert torch.autograd.gradcheck(cayley_menger_volume, PENTACHORA[:2].clone().requires_grad_())


def test_the_determinant_of_five_centred_vertices_is_always_zero():
    centred = PENTACHORA - PENTACHORA.mean(dim=1, keepdim=True)
    assert torch.linalg.det(centred @ centred.mT).abs().max() < 1e-12


def test_inclusion_in_closed_form_is_the_ratio_of_volumes():
    torch.testing.assert_close(included(POINTS, PENTACHORA), inclusion_ratio_by_volumes(POINTS, PENTACHORA))


@pytest.mark.parametrize("ratio", [included, inclusion_ratio_by_volumes])
def test_a_point_in_a_pentachoron_has_inclusion_one(ratio):
    weights = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = ((weights / weights.sum(1, keepdim=True))[..., None] * PENTACHORA).sum(1)
    for z in (inside, PENTACHORA[:, 3]):
        torch.testing.assert_close(ratio(z, PENTACHORA), torch.ones(6, dtype=torch.float64))


def test_inclusion_sinks_to_zero_far_away():
    ratios = torch.stack([included(far * POINTS, PENTACHORA) for far in (1, 10, 1e3, 1e6)])
    assert (ratios.diff(dim=0) < 0).all()
    assert (ratios[-1] < 1e-5).all()


def test_inclusion_survives_a_rigid_motion_and_a_scale():
    moved = [3 * (one @ ROTATION) + 5 for one in (POINTS, PENTACHORA)]
    torch.testing.assert_close(included(*moved), included(POINTS, PENTACHORA))


@given(st.lists(st.floats(-1e30, 1e30), min_size=7, max_size=7))
def test_inclusion_lies_between_zero_and_one_for_any_point(numbers):
    ratio = included(torch.tensor(numbers, dtype=torch.float64), PENTACHORA[0])
    assert 0 < ratio <= 1


def test_a_role_weighted_score_is_linear():
    z = F.normalize(POINTS, dim=-1)
    cosines = torch.einsum("bd,kvd->bkv", z, PENTACHORA)
    torch.testing.assert_close(z @ role_directions(3 * PENTACHORA).mT, (cosines * torch.tensor(ROLE_WEIGHTS)).sum(-1))


def test_vertices_of_the_same_role_may_change_places():
    torch.testing.assert_close(role_directions(PENTACHORA[:, [0, 4, 3, 2, 1]]), role_directions(PENTACHORA))


def cantor_staircase(x, alpha=0.5, levels=20):
    """De Rham's staircase F on [0, 1]: F(x) = a F(3x) up to 1/3, a up to 2/3, a + (1 - a) F(3x - 2) beyond."""
    x = x.double().clamp(0, 1)
    below, share = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(levels):
        left, right = 3 * x < 1, 3 * x > 2
        below = torch.where(left, below, below + alpha * share)
        share = torch.where(left, alpha * share, torch.where(right, (1 - alpha) * share, 0.0))
        x = torch.where(left, 3 * x, torch.where(right, 3 * x - 2, 0.0))
    return below + share * x


def cantor_position(bins, count, lean, reach=0.3):
    """x = clip((bin + 1/2) / T + reach tanh(lean), 0, 1): per sample, unlike the published position."""
    return ((bins + 0.5) / count + reach * lean.tanh()).clamp(0, 1)


LEVELS = 7
GRID = torch.arange(3**LEVELS + 1, dtype=torch.float64) / 3**LEVELS


def test_the_staircase_rises_from_zero_to_one_in_small_steps():
    steps = cantor_staircase(GRID, levels=LEVELS).diff()
    assert cantor_staircase(GRID[[0, -1]]).tolist() == [0, 1]
    assert steps.min() >= 0
    assert steps.max() <= 2.0**-LEVELS * (1 + 1e-9)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.7])
def test_every_staircase_is_monotone(alpha):
    assert cantor_staircase(GRID, alpha).diff().min() > -1e-15


def test_the_even_staircase_is_symmetric():
    values = cantor_staircase(GRID)
    torch.testing.assert_close(values + values.flip(0), torch.ones_like(values))


def published_staircase(x, alpha=0.5, tau=0.25, levels=12):
    """The original's: a soft digit of a hard remainder (david.md 1.4)."""
    value, centres = torch.zeros_like(x), torch.tensor([0.5, 1.5, 2.5], dtype=x.dtype)
    for level in range(1, levels + 1):
        digit = torch.softmax(-((3 * x)[:, None] - centres).square() / tau, dim=1)
        value += (alpha * digit[:, 1] + digit[:, 2]) * 2.0**-level
        x = (3 * x).frac()
    return value


def test_the_published_staircase_falls_by_half_at_a_third():
    x = torch.tensor([1 / 3 - 1e-9, 1 / 3 + 1e-9], dtype=torch.float64)
    assert published_staircase(x).diff().item() == pytest.approx(-0.5, abs=0.01)
    assert cantor_staircase(x).diff().abs().item() < 1e-2


def test_a_place_on_the_staircase_does_not_depend_on_batch_mates():
    bins, lean = torch.tensor([10, 40]), torch.tensor([0.3, -2.0])
    assert cantor_position(bins, 100, lean)[:1].equal(cantor_position(bins[:1], 100, lean[:1]))
