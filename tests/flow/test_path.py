import math
from dataclasses import dataclass
from typing import Protocol

import pytest
import torch
from torch import Tensor

from stages.flow.path import interpolate, per_sample


class ProbabilityPath(Protocol):
    """Factors of data and noise at time s, and their derivatives."""

    def alpha(self, s: Tensor) -> Tensor: ...

    def sigma(self, s: Tensor) -> Tensor: ...

    def d_alpha(self, s: Tensor) -> Tensor: ...

    def d_sigma(self, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LinearPath:
    """x_s = (1 - s) x0 + s eps."""

    def alpha(self, s: Tensor) -> Tensor:
        return 1 - s

    def sigma(self, s: Tensor) -> Tensor:
        return s

    def d_alpha(self, s: Tensor) -> Tensor:
        return -torch.ones_like(s)

    def d_sigma(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)


@dataclass(frozen=True)
class VariancePreservingPath:
    """alpha = cos(pi s / 2), sigma = sin(pi s / 2); its velocity is (pi / 2) times the network's v_prediction."""

    def alpha(self, s: Tensor) -> Tensor:
        return torch.cos(s * math.pi / 2)

    def sigma(self, s: Tensor) -> Tensor:
        return torch.sin(s * math.pi / 2)

    def d_alpha(self, s: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(s)

    def d_sigma(self, s: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(s)


PATHS = [LinearPath(), VariancePreservingPath()]


def state_on(path: ProbabilityPath, x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """alpha(s) x0 + sigma(s) eps: the oracle of `interpolate`."""
    return per_sample(path.alpha(s), x0) * x0 + per_sample(path.sigma(s), eps) * eps


def velocity_on(path: ProbabilityPath, x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """dx/ds = alpha'(s) x0 + sigma'(s) eps."""
    return per_sample(path.d_alpha(s), x0) * x0 + per_sample(path.d_sigma(s), eps) * eps


def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    return x0, eps, torch.tensor([0.2, 0.7], dtype=torch.float64)


def test_interpolate_is_the_state_of_the_linear_path() -> None:
    assert torch.equal(interpolate(*states()), state_on(LinearPath(), *states()))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_is_the_derivative_of_the_path(path: ProbabilityPath) -> None:
    x0, eps, s = states()
    _, derivative = torch.autograd.functional.jvp(  # type: ignore[no-untyped-call]
        lambda s: state_on(path, x0, eps, s), s, torch.ones_like(s)
    )
    torch.testing.assert_close(velocity_on(path, x0, eps, s), derivative, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_path_leads_from_data_to_noise(path: ProbabilityPath) -> None:
    x0, eps, s = states()
    torch.testing.assert_close(state_on(path, x0, eps, torch.zeros_like(s)), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(state_on(path, x0, eps, torch.ones_like(s)), eps, rtol=0, atol=1e-15)


def test_the_flow_velocity_is_noise_minus_data() -> None:
    x0, eps, s = states()
    torch.testing.assert_close(velocity_on(LinearPath(), x0, eps, s), eps - x0)


def test_the_variance_preserving_velocity_is_v_prediction_times_the_speed_of_the_angle() -> None:
    x0, eps, s = states()
    path = VariancePreservingPath()
    alpha, sigma = per_sample(path.alpha(s), x0), per_sample(path.sigma(s), x0)
    torch.testing.assert_close(velocity_on(path, x0, eps, s), math.pi / 2 * (alpha * eps - sigma * x0))


def test_the_variance_preserving_path_keeps_the_variance() -> None:
    s, path = torch.linspace(0, 1, 11, dtype=torch.float64), VariancePreservingPath()
    torch.testing.assert_close(path.alpha(s) ** 2 + path.sigma(s) ** 2, torch.ones_like(s))


def test_a_state_has_the_type_of_its_data_whatever_the_type_of_time() -> None:
    x0, eps, s = states()
    assert interpolate(x0.float(), eps.float(), s).dtype == torch.float32
