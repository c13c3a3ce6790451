"""The distances of torchmetrics, ours and closed forms of Gaussians are one number each, to a thousandth."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.evaluate.distances.columns import (
    PictureSet,
    frechet_by_torchmetrics,
    kernel_by_torchmetrics,
    make_column,
    make_floor,
    published_column,
    unit_of,
)
from stages.evaluate.distances.estimators import frechet_distance, kernel_distance
from stages.system.refusal import Refused
from tests.evaluate.test_distances import normal, with_moments

AGREE = 1e-3


def transport_pair(rows: int = 64) -> tuple[Tensor, Tensor, float]:
    """Rows of two Gaussians, the other by an optimal map y = T x + 1, and their squared Wasserstein distance."""
    root, turn = normal(4, 4, 4), normal(5, 4, 4)
    covariance, transport = root @ root.T + torch.eye(4), turn @ turn.T + torch.eye(4)
    x = with_moments(torch.zeros(4, dtype=torch.float64), covariance, 6, rows)
    y = with_moments(torch.ones(4, dtype=torch.float64), transport @ covariance @ transport, 7, rows)
    shift = torch.eye(4, dtype=torch.float64) - transport
    return x, y, 4 + float((shift @ covariance @ shift).trace())


def frechet_by_numpy(x: Tensor, y: Tensor) -> float:
    """By the eigenvalues of the product of the covariances."""
    one, other = x.numpy(), y.numpy()
    product = np.linalg.eigvals(np.cov(one.T) @ np.cov(other.T))
    cross = np.sqrt(np.clip(product.real, 0, None)).sum()
    means = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return float(means + np.cov(one.T).trace() + np.cov(other.T).trace() - 2 * cross)


def kernel(a: Tensor, b: Tensor) -> float:
    return float((a @ b / len(a) + 1) ** 3)


def kernel_by_loops(x: Tensor, y: Tensor, with_pairs: bool) -> float:
    n = len(x)
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j)
    between = sum(kernel(x[i], y[j]) for i in range(n) for j in range(n) if with_pairs or i != j)
    return within / (n * (n - 1)) - 2 * between / (n * n if with_pairs else n * (n - 1))


def test_the_frechet_distance_of_gaussians_is_the_closed_form_in_every_implementation() -> None:
    x, y, expected = transport_pair()
    for measured in (frechet_by_torchmetrics, frechet_distance, frechet_by_numpy):
        assert measured(x, y) == pytest.approx(expected, rel=AGREE)
        assert measured(y, x) == pytest.approx(expected, rel=AGREE)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 200, 6), (90, 300, 6), (12, 12, 40), (12, 20, 40), (30, 200, 40)])
def test_implementations_agree_for_any_numbers_of_rows_and_features(n: int, m: int, d: int) -> None:
    x, y = normal(0, n, d), 1.4 * normal(1, m, d) + 0.5
    expected = frechet_by_numpy(x, y)
    assert frechet_by_torchmetrics(x, y) == pytest.approx(expected, rel=AGREE)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=AGREE)


def test_kernel_distances_are_the_sums_that_define_them_with_and_without_the_pairs() -> None:
    common = normal(0, 15, 5)
    x, y = common + normal(1, 15, 5), common + 0.7 * normal(2, 15, 5) + 0.2
    assert kernel_by_torchmetrics(x, y, 15) == pytest.approx(kernel_by_loops(x, y, True), rel=AGREE)
    assert kernel_distance(x, y) == pytest.approx(kernel_by_loops(x, y, False), rel=AGREE)


def test_the_kernel_distance_of_subsets_is_that_of_gaussians_and_the_same_at_every_call() -> None:
    """N(0, 1) against N(0, a^2) in d dimensions: 3 (1 - a^2)^2 / d."""
    x, y = normal(0, 6000, 4), 1.5 * normal(1, 6000, 4)
    state = torch.get_rng_state()
    value = kernel_by_torchmetrics(x, y, 1000)
    assert value == pytest.approx(3 * (1 - 1.5**2) ** 2 / 4, rel=0.15)
    assert kernel_by_torchmetrics(x, y, 1000) == value
    assert torch.equal(torch.get_rng_state(), state)


def test_columns_of_one_prompt_a_row_do_not_depend_on_the_scale_of_the_features_and_published_ones_do() -> None:
    prompt = normal(0, 60, 4)
    own, other, third = (prompt + normal(seed, 60, 4) for seed in (1, 2, 3))

    def columns(scale: float) -> tuple[float | None, ...]:
        sets = [PictureSet(60, scale * one) for one in (third, other, own)]
        unit = unit_of(sets[1], "f")
        column, reference, base = (one.in_units(unit) for one in sets)
        measured, floor = make_column(column, reference), make_floor(base, reference)
        assert floor is not None
        return measured.frechet, measured.kid, floor.frechet.limit, floor.kid.mean

    assert columns(1.0) == pytest.approx(columns(250.0), rel=1e-6)
    published = [published_column(PictureSet(60, scale * third), PictureSet(60, scale * other)) for scale in (1, 10)]
    assert published[1].frechet == pytest.approx(100 * (published[0].frechet or 0), rel=1e-6)


def test_features_that_never_change_are_refused() -> None:
    with pytest.raises(Refused, match=r"features: f: are the same for every picture .* - name others"):
        unit_of(PictureSet(5, torch.ones(5, 3)), "f")
