"""The windows of few-step sampling."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from stages.flow.windows import landing_velocity, window_ends, window_of


# The library converts a tensor by a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("windows", [1, 2, 4, 8])
def test_ends_are_the_times_of_the_stock_sampler(windows, shift):
    scheduler = DPMSolverMultistepScheduler(
        solver_order=1, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    scheduler.set_timesteps(windows)
    torch.testing.assert_close(window_ends(windows, shift).float(), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_coarse_ends_are_among_the_finer_ones(shift):
    for windows in (1, 2, 3, 4):
        torch.testing.assert_close(window_ends(windows, shift), window_ends(2 * windows, shift)[::2])


def test_a_time_at_an_end_belongs_to_the_window_below_it():
    ends = torch.tensor([0.999, 0.75, 0.5, 0.0], dtype=torch.float64)
    s = torch.tensor([1.0, 0.999, 0.76, 0.75, 0.74, 0.5, 0.01, 0.0])
    assert window_of(s, ends).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_one_euler_step_of_the_landing_velocity_lands():
    generator = torch.Generator().manual_seed(0)
    x, landing = torch.randn(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    s, end = torch.tensor([0.9, 0.7, 0.3]).double(), torch.tensor([0.75, 0.5, 0.0]).double()
    u = landing_velocity(x, s, landing, end)
    torch.testing.assert_close(x + (end - s).view(-1, 1, 1, 1) * u, landing)
