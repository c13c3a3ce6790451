"""Laws of pooling many classes that were each measured a few times."""

import pytest
import torch

from stages.classes.difficulty import ClassMeans, PooledMeans, class_means, pool_means


def drawn(classes: int, tau: float, noise: float, seed: int = 0) -> tuple[torch.Tensor, ClassMeans, ClassMeans]:
    """True values, a covariate that foretells half of their variance, and measurements."""
    generator = torch.Generator().manual_seed(seed)
    covariate, rest, errors = torch.randn(3, classes, generator=generator, dtype=torch.float64)
    theta = 2 + tau * covariate + tau * rest
    return (
        theta,
        ClassMeans(covariate, torch.zeros_like(theta)),
        ClassMeans(theta + noise * errors, torch.full_like(theta, noise)),
    )


def worst(found: PooledMeans, theta: torch.Tensor) -> float:
    return float((found.mean - theta).square().mean())


def test_the_error_of_a_mean_comes_from_one_deviation_for_all_classes() -> None:
    found = class_means([torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0, 5.0, 5.0])])
    assert found.mean.tolist() == [2, 5]
    within = 2 / (6 - 2)
    assert found.standard_error.tolist() == pytest.approx([(within / 2) ** 0.5, (within / 4) ** 0.5])


def test_where_noise_explains_all_differences_every_class_gets_the_common_mean() -> None:
    found = pool_means(ClassMeans(torch.tensor([1.0, 1.1, 0.9, 1.0]), torch.full((4,), 0.5)), [])
    assert found.tau == 0
    assert found.mean.tolist() == pytest.approx([1.0] * 4)


def test_a_class_that_was_measured_exactly_keeps_its_own_mean() -> None:
    theta, covariate, _ = drawn(20, 1.0, 0.0)
    found = pool_means(ClassMeans(theta, torch.full_like(theta, 1e-4)), [covariate])
    assert found.mean.tolist() == pytest.approx(theta.tolist(), abs=1e-3)
    assert found.standard_error.max() < 2e-4


def test_the_deviation_of_the_classes_is_found_again() -> None:
    _, covariate, measured = drawn(4000, 0.5, 0.8)
    assert pool_means(measured, [covariate]).tau == pytest.approx(0.5, rel=0.1)
    assert pool_means(measured, []).tau == pytest.approx(0.5 * 2**0.5, rel=0.1)


def test_pooling_is_nearer_to_the_truth_than_the_means_and_a_covariate_nearer_still() -> None:
    theta, covariate, measured = drawn(4000, 0.5, 0.8)
    alone, helped = pool_means(measured, []), pool_means(measured, [covariate])
    assert worst(helped, theta) < worst(alone, theta) < float((measured.mean - theta).square().mean())


def test_the_stated_error_is_the_one_that_is_made() -> None:
    theta, covariate, measured = drawn(4000, 0.5, 0.8)
    found = pool_means(measured, [covariate])
    assert worst(found, theta) == pytest.approx(float(found.standard_error.square().mean()), rel=0.1)


def test_few_classes_allow_no_covariate() -> None:
    _, covariate, measured = drawn(9, 1.0, 0.3)
    assert torch.equal(pool_means(measured, [covariate]).mean, pool_means(measured, []).mean)
    _, covariate, measured = drawn(10, 1.0, 0.3)
    assert not torch.equal(pool_means(measured, [covariate]).mean, pool_means(measured, []).mean)


def test_a_covariate_that_is_itself_noisy_makes_the_estimates_less_certain() -> None:
    _, covariate, measured = drawn(50, 0.5, 0.8)
    noisy = ClassMeans(covariate.mean, torch.full_like(covariate.mean, 0.3))
    assert (pool_means(measured, [noisy]).standard_error > pool_means(measured, [covariate]).standard_error).all()
