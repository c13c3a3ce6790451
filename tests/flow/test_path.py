import math

import pytest
import torch

from stages.flow.path import LinearPath, ProbabilityPath, VariancePreservingPath, interpolate, path_velocity, per_sample

PATHS = [LinearPath(), VariancePreservingPath()]


def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return x0, eps, torch.tensor([0.2, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_is_the_derivative_of_the_path(path: ProbabilityPath) -> None:
    x0, eps, s = states()
    _, derivative = torch.autograd.functional.jvp(  # type: ignore[no-untyped-call]
        lambda s: interpolate(path, x0, eps, s), s, torch.ones_like(s)
    )
    torch.testing.assert_close(path_velocity(path, x0, eps, s), derivative, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_path_leads_from_data_to_noise(path: ProbabilityPath) -> None:
    x0, eps, s = states()
    torch.testing.assert_close(interpolate(path, x0, eps, torch.zeros_like(s)), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(interpolate(path, x0, eps, torch.ones_like(s)), eps, rtol=0, atol=1e-15)


def test_the_flow_velocity_is_noise_minus_data() -> None:
    x0, eps, s = states()
    torch.testing.assert_close(path_velocity(LinearPath(), x0, eps, s), eps - x0)


def test_the_circular_velocity_is_v_prediction_times_the_speed_of_the_angle() -> None:
    x0, eps, s = states()
    alpha, sigma = per_sample(VariancePreservingPath().alpha(s), x0), per_sample(VariancePreservingPath().sigma(s), x0)
    torch.testing.assert_close(
        path_velocity(VariancePreservingPath(), x0, eps, s), math.pi / 2 * (alpha * eps - sigma * x0)
    )


def test_the_circular_path_keeps_the_variance() -> None:
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(
        VariancePreservingPath().alpha(s) ** 2 + VariancePreservingPath().sigma(s) ** 2, torch.ones_like(s)
    )


def test_a_state_has_the_type_of_its_data_whatever_the_type_of_time() -> None:
    x0, eps, s = states()
    assert interpolate(LinearPath(), x0.float(), eps.float(), s).dtype == torch.float32
