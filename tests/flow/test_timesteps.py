import pytest
import torch
from pydantic import ValidationError

from stages.flow.timesteps import (
    TimestepDensity,
    bin_of_step,
    bin_of_time,
    min_snr_weight,
    shift_time,
    v_prediction_weight,
)

DENSITIES = [
    TimestepDensity(),
    TimestepDensity(shift=3.0, uniform_share=0.0),
    TimestepDensity(shift=0.4, uniform_share=0.3),
    TimestepDensity(shift=1.0),
    TimestepDensity(shift=5.0, uniform_share=1.0),
]
UNIT = torch.linspace(0, 1, 100_001, dtype=torch.float64)


def pdf(density: TimestepDensity, s: torch.Tensor) -> torch.Tensor:
    """Density at s: the oracle of `sample`."""
    shifted = density.shift / (density.shift - (density.shift - 1) * s) ** 2
    return density.uniform_share + (1 - density.uniform_share) * shifted


def cdf(density: TimestepDensity, s: torch.Tensor) -> torch.Tensor:
    """Probability of a time below s: the oracle of `quantile`."""
    return density.uniform_share * s + (1 - density.uniform_share) * shift_time(s, 1 / density.shift)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_higher_shift_leans_to_noise() -> None:
    inner = UNIT[1:-1]
    assert (shift_time(inner, 3.0) > shift_time(inner, 1.8)).all()
    assert (shift_time(inner, 1.8) > inner).all()
    few_clean, fewer_clean = (cdf(TimestepDensity(shift=s, uniform_share=0.0), torch.tensor(0.25)) for s in (1.0, 3.0))
    assert float(few_clean) == pytest.approx(0.25)
    assert float(fewer_clean) == pytest.approx(0.1)


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse() -> None:
    assert shift_time(0.0, 3.0) == 0.0
    assert shift_time(1.0, 3.0) == 1.0
    torch.testing.assert_close(shift_time(shift_time(UNIT, 3.0), 1 / 3.0), UNIT)


def test_the_default_density_is_half_uniform_and_half_shifted_by_1_8() -> None:
    assert TimestepDensity() == TimestepDensity(shift=1.8, uniform_share=0.5)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_the_density_integrates_to_one(density: TimestepDensity) -> None:
    assert float(torch.trapezoid(pdf(density, UNIT), UNIT)) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_the_density_is_the_derivative_of_its_distribution(density: TimestepDensity) -> None:
    slope = cdf(density, UNIT).diff() / UNIT.diff()
    torch.testing.assert_close(slope, pdf(density, (UNIT[1:] + UNIT[:-1]) / 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_the_quantile_inverts_the_distribution(density: TimestepDensity) -> None:
    torch.testing.assert_close(cdf(density, density.quantile(UNIT)), UNIT, rtol=0, atol=1e-13)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_the_histogram_of_the_draws_matches_the_density(density: TimestepDensity) -> None:
    n, bins = 100_000, 20
    counts = torch.bincount(bin_of_time(density.sample(n, seeded()), bins), minlength=bins)
    share = cdf(density, torch.linspace(0, 1, bins + 1, dtype=torch.float64)).diff()
    assert ((counts - n * share).abs() < 4.5 * (n * share * (1 - share)).sqrt()).all()


def test_the_draws_are_a_function_of_the_seed() -> None:
    density = TimestepDensity()
    assert torch.equal(density.sample(5, seeded(1)), density.sample(5, seeded(1)))
    assert not torch.equal(density.sample(5, seeded(1)), density.sample(5, seeded(2)))


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_stratified_draws_take_one_time_from_each_share_of_the_probability(density: TimestepDensity) -> None:
    strata = (cdf(density, density.sample(7, seeded(), stratified=True)) * 7).floor()
    assert strata.tolist() == list(range(7))


@pytest.mark.parametrize("wrong", [{"shift": 0.0}, {"uniform_share": 1.5}, {"shfit": 2.0}])
def test_an_invalid_density_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TimestepDensity.model_validate(wrong)


def test_a_bin_of_a_step_is_a_tenth_of_it() -> None:
    k = torch.arange(1000)
    assert torch.equal(bin_of_step(k, 100, 1000), k // 10)
    assert bin_of_step(torch.tensor([0, 3, 7]), 4, steps=8).tolist() == [0, 1, 3]


def test_a_bin_of_a_time_covers_its_ends() -> None:
    assert bin_of_time(torch.tensor([0.0, 0.099, 0.5, 0.999, 1.0]), 10).tolist() == [0, 0, 5, 9, 9]


def test_min_snr_weight_is_the_smaller_of_its_two_arms() -> None:
    s = torch.tensor([0.0, 0.1, 0.5, 1.0])
    torch.testing.assert_close(min_snr_weight(s, 5.0), torch.tensor([0.0, 0.05, 0.25, 0.0]))


def test_weighted_by_vp_a_velocity_error_is_one_of_v_prediction() -> None:
    """v_vp = alpha eps - sigma x0 at the network input x: with x held, dv = g dv_vp, g = alpha + sigma."""
    s = UNIT[1:-1]
    sigma = s / (s**2 + (1 - s) ** 2).sqrt()
    g = sigma + (1 - sigma**2).sqrt()
    torch.testing.assert_close(v_prediction_weight(s) * g**2, torch.ones_like(s))
