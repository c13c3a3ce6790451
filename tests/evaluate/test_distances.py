"""Laws of the distances between two sets of samples: closed forms of Gaussians, no bias, and floors that hold."""

import pytest
import torch
from torch import Tensor

from stages.evaluate.distances.estimators import (
    answer_differences,
    frechet_distance,
    frechet_floor,
    kernel_distance,
    kernel_floor,
    pooled_variation,
    prompt_variation,
    variation_floor,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, covariance: Tensor, seed: int, rows: int = 64) -> Tensor:
    """Rows whose sample mean and sample covariance are exactly these."""
    rows_ = normal(seed, rows, len(mean))
    rows_ = rows_ - rows_.mean(0)
    white = rows_ @ torch.linalg.inv(torch.linalg.cholesky(rows_.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_the_frechet_distance_of_commuting_covariances_is_that_of_their_eigenvalues() -> None:
    basis, _ = torch.linalg.qr(normal(0, 5, 5))
    one, other = torch.tensor([[0.3, 1, 2, 5, 9], [4, 0.1, 2, 1, 3]], dtype=torch.float64)
    mean = normal(1, 5)
    x = with_moments(mean, basis @ one.diag() @ basis.T, 2)
    y = with_moments(mean + 2, basis @ other.diag() @ basis.T, 3)
    expected = 5 * 2**2 + float((one.sqrt() - other.sqrt()).square().sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_covariances_that_do_not_commute_is_that_of_the_transport_between_them() -> None:
    root = normal(4, 4, 4)
    covariance = root @ root.T + torch.eye(4)
    turn = normal(5, 4, 4)
    transport = turn @ turn.T + torch.eye(
        4
    )  # symmetric and positive: x -> T x is optimal, so that W2^2 is E|x - T x|^2
    x = with_moments(torch.zeros(4, dtype=torch.float64), covariance, 6)
    y = with_moments(torch.ones(4, dtype=torch.float64), transport @ covariance @ transport, 7)
    shift = torch.eye(4, dtype=torch.float64) - transport
    assert frechet_distance(x, y) == pytest.approx(4 + float((shift @ covariance @ shift).trace()), rel=1e-9)


def test_the_frechet_distance_of_fewer_rows_than_features_is_finite_and_symmetric() -> None:
    x, y = normal(0, 6, 20), normal(1, 6, 20)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5, 1.5])
def test_the_kernel_distance_of_gaussians_is_unbiased_even_where_rows_share_a_prompt(scale: float) -> None:
    """For x ~ N(0, 1), y ~ N(0, a^2) in d dimensions E k = 1 + 3 a_x^2 a_y^2 / d, so MMD^2 = 3 (1 - a^2)^2 / d."""
    d, n, trials = 4, 8, 3000
    common, own_x, own_y = (normal(seed, trials, n, d) for seed in range(3))
    xs, ys = (0.8 * common + 0.6 * own_x), scale * (0.8 * common + 0.6 * own_y)
    values = torch.tensor([kernel_distance(x, y) for x, y in zip(xs, ys, strict=True)])
    error = float(values.std() / trials**0.5)
    assert float(values.mean()) == pytest.approx(3 * (1 - scale**2) ** 2 / d, abs=4 * error)
    assert error < 0.05


def test_a_swap_of_rows_is_a_swap_of_rows() -> None:
    x, y = normal(0, 12, 3), normal(1, 12, 3)
    kids, frechets = kernel_floor(x, y, 3), frechet_floor(x, y, 3)
    signs = torch.randint(0, 2, (3, 12), generator=torch.Generator().manual_seed(0)) * 2 - 1
    for i in range(3):
        keep = (signs[i] > 0)[:, None]
        swapped = torch.where(keep, x, y), torch.where(keep, y, x)
        assert float(kids[i]) == pytest.approx(kernel_distance(*swapped), abs=1e-12)
        assert float(frechets[i]) == pytest.approx(frechet_distance(*swapped), rel=1e-6)


def test_two_sets_of_one_model_lie_within_the_floor_and_those_of_another_do_not() -> None:
    prompt = normal(0, 200, 6)
    real, other, third = (prompt + normal(seed, 200, 6) for seed in (1, 2, 3))
    floors = frechet_floor(real, other), kernel_floor(real, other)
    for distance, floor in zip((frechet_distance, kernel_distance), floors, strict=True):
        bound = float(floor.quantile(0.99))
        assert distance(third, other) < bound
        assert distance(1.3 * third, other) > bound
        assert distance(third + 0.4, other) > bound


def test_total_variation_is_that_of_the_counted_answers() -> None:
    x, y = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]]), torch.tensor([[0, 0, 1, 1], [2, 2, 2, 0]])
    differences = answer_differences(x, y, 3)
    assert float(pooled_variation(differences)) == pytest.approx(1 / 8)  # 3, 1, 4 answers against 3, 2, 3
    assert float(prompt_variation(differences)) == pytest.approx(1 / 4)  # each prompt has one answer of four elsewhere


def test_a_shifted_choice_leaves_the_floor_of_total_variation() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.ones(5) / 5
    leaning = torch.tensor([0.28, 0.18, 0.18, 0.18, 0.18])

    def draw(weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 24 * 48, True, generator=generator).view(24, 48)

    one, other, third, shifted = draw(even), draw(even), draw(even), draw(leaning)
    for measure in (pooled_variation, prompt_variation):
        bound = float(variation_floor(answer_differences(one, other, 5), measure).quantile(0.99))
        assert float(measure(answer_differences(third, other, 5))) < bound
    pooled = variation_floor(answer_differences(one, other, 5), pooled_variation)
    assert float(pooled_variation(answer_differences(shifted, other, 5))) > float(pooled.quantile(0.99))
