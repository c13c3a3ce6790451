from itertools import pairwise
from typing import Any, Literal, get_args

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stages.flow.bridge import Bridge, TailPolicy, x0_from_velocity
from stages.flow.path import interpolate, per_sample
from stages.flow.schedule import NoiseSchedule, PredictionType
from stages.flow.solver import euler, uniform_grid
from stages.system.refusal import Refused

PREDICTIONS = get_args(PredictionType)
CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}


def bridge(prediction_type: str = "epsilon", tail: TailPolicy = "hold", rescale: bool = False) -> Bridge:
    config = CONFIG | {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale}
    return Bridge(NoiseSchedule.from_config(config), tail)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x_vp: Tensor, k: Tensor) -> Tensor:
    """Any function of the teacher's input and step will do."""
    return torch.tanh(x_vp.flip(-1) + per_sample(k, x_vp) / 500)


def velocity_of(teacher: Bridge, x: Tensor, s: Tensor, k: Tensor) -> Tensor:
    return teacher.velocity(x, s, k, network(teacher.teacher_input(x, s), k))


def ddim(prediction_type: str, steps: int, betas: Literal["own", "default"] = "own") -> Any:
    """Diffusers' DDIM, counting with the betas of the folder in float64, or with the library's default ones."""
    scheduler: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
        prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if betas == "own":
        scheduler.alphas_cumprod = bridge(prediction_type).schedule.alpha_bar
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(("k", "s"), [(0, 0.02834), (354, 0.5001), (500, 0.6181), (900, 0.8930), (999, 0.93596)])
def test_the_table_of_times_is_the_published_one(k: int, s: float) -> None:
    digits = 5 if k in (0, 999) else 4
    assert round(float(bridge().s_of_k(torch.tensor([k]))), digits) == s


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("k", "j"), [(999, 949), (999, 0), (700, 650), (500, 499), (354, 20), (40, 0), (1, 0)])
def test_a_ddim_step_is_an_euler_step_of_the_bridged_velocity(prediction_type: PredictionType, k: int, j: int) -> None:
    teacher = bridge(prediction_type)
    x_vp, at_k, at_j = noise(2, 3, 4, 5), torch.full((2,), k), torch.full((2,), j)
    output = network(x_vp, at_k)
    a_k, a_j = teacher.schedule.alpha_bar[k], teacher.schedule.alpha_bar[j]
    if prediction_type == "epsilon":
        eps_hat, x0_hat = output, (x_vp - (1 - a_k).sqrt() * output) / a_k.sqrt()
    else:
        eps_hat = a_k.sqrt() * output + (1 - a_k).sqrt() * x_vp
        x0_hat = a_k.sqrt() * x_vp - (1 - a_k).sqrt() * output
    expected = a_j.sqrt() * x0_hat + (1 - a_j).sqrt() * eps_hat  # DDIM, eta = 0

    s_k, s_j = teacher.s_of_k(at_k), teacher.s_of_k(at_j)
    x = x_vp / teacher.teacher_input(torch.ones_like(x_vp), s_k)
    stepped = x + per_sample(s_j - s_k, x) * velocity_of(teacher, x, s_k, at_k)
    torch.testing.assert_close(teacher.teacher_input(stepped, s_j), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("steps", [4, 25])
def test_every_step_of_diffusers_ddim_is_an_euler_step(prediction_type: PredictionType, steps: int) -> None:
    teacher, scheduler = bridge(prediction_type), ddim(prediction_type, steps)
    x_vp = noise(2, 3, 4, 5)
    for k, j in pairwise([*scheduler.timesteps.tolist(), -1]):
        at_k = torch.full((2,), k)
        s_k = teacher.s_of_k(at_k)
        s_j = teacher.s_of_k(torch.full((2,), j)) if j >= 0 else torch.zeros_like(s_k)
        x = x_vp / teacher.teacher_input(torch.ones_like(x_vp), s_k)
        stepped = x + per_sample(s_j - s_k, x) * velocity_of(teacher, x, s_k, at_k)
        x_vp = scheduler.step(network(x_vp, at_k), k, x_vp).prev_sample
        torch.testing.assert_close(teacher.teacher_input(stepped, s_j), x_vp, rtol=0, atol=1e-10)


def plain_ddim(scheduler: Any, x_vp: Tensor) -> Tensor:
    for k in scheduler.timesteps.tolist():
        x_vp = scheduler.step(network(x_vp, torch.full((len(x_vp),), k)), k, x_vp).prev_sample
    return x_vp


def bridged_ddim(teacher: Bridge, scheduler: Any, x: Tensor) -> Tensor:
    grid = [1.0, 0.97, *teacher.s_of_k(scheduler.timesteps).tolist(), 0.0]
    return euler(lambda x, s: velocity_of(teacher, x, s, teacher.nearest_state(s)[0]), x, grid)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_faithful_tail_reproduces_plain_ddim_from_noise(prediction_type: PredictionType) -> None:
    eps, scheduler = noise(2, 3, 4, 5), ddim(prediction_type, 10)
    expected = plain_ddim(scheduler, eps)
    sampled = bridged_ddim(bridge(prediction_type, "faithful"), scheduler, eps)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=1e-10)
    held = bridged_ddim(bridge(prediction_type, "hold"), scheduler, eps)
    assert float((held - expected).abs().max()) > 1e-3


def test_the_default_betas_of_the_library_do_not_agree() -> None:
    eps = noise(2, 3, 4, 5)
    wrong = plain_ddim(ddim("epsilon", 10, betas="default"), eps)
    sampled = bridged_ddim(bridge(tail="faithful"), ddim("epsilon", 10), eps)
    assert float((sampled - wrong).abs().max()) > 1e-2


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_gaussian_data_gives_the_exact_marginal_velocity(prediction_type: PredictionType) -> None:
    mean, variance = 0.7, 0.3
    teacher = bridge(prediction_type)
    s = torch.linspace(teacher.s_table[0], teacher.s_last, 23, dtype=torch.float64)
    k, x = teacher.k_of_s(s), noise(23, 3, 4, 5)

    x_vp = teacher.teacher_input(x, s)
    # the schedule between its steps, from s alone: sigma / alpha = s / (1 - s), alpha^2 + sigma^2 = 1
    alpha, sigma = (
        per_sample(1 / (1 + (s / (1 - s)) ** 2).sqrt(), x),
        per_sample(1 / (1 + ((1 - s) / s) ** 2).sqrt(), x),
    )
    surprise = (x_vp - alpha * mean) / (alpha**2 * variance + sigma**2)
    eps_hat, x0_hat = sigma * surprise, mean + alpha * variance * surprise
    output = eps_hat if prediction_type == "epsilon" else alpha * eps_hat - sigma * x0_hat

    t = per_sample(s, x)
    exact = ((t - (1 - t) * variance) * (x - (1 - t) * mean)) / ((1 - t) ** 2 * variance + t**2) - mean
    torch.testing.assert_close(teacher.velocity(x, s, k, output), exact, rtol=0, atol=1e-10)


def test_an_exact_prediction_gives_noise_minus_data_for_both_predictions() -> None:
    x0, eps, k = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1), torch.tensor([20, 999])
    for prediction_type in PREDICTIONS:
        teacher = bridge(prediction_type)
        s = teacher.s_of_k(k)
        abar = per_sample(teacher.schedule.alpha_bar[k], x0)
        output = eps if prediction_type == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x0
        v = teacher.velocity(interpolate(x0, eps, s), s, k, output)
        torch.testing.assert_close(v, eps - x0, rtol=0, atol=1e-12)


def test_the_time_of_a_step_and_the_step_of_a_time_are_inverse() -> None:
    teacher = bridge()
    steps = torch.arange(1000)
    assert torch.equal(teacher.s_of_k(steps), teacher.s_table)
    torch.testing.assert_close(teacher.k_of_s(teacher.s_table), steps.double(), rtol=0, atol=1e-9)
    between = torch.linspace(0, 999, 3334, dtype=torch.float64)
    torch.testing.assert_close(teacher.k_of_s(teacher.s_of_k(between)), between, rtol=0, atol=1e-9)


def test_between_two_steps_the_log_odds_are_linear() -> None:
    teacher = bridge()
    ends, middle = teacher.s_of_k(torch.tensor([10, 11])).logit(), teacher.s_of_k(torch.tensor([10.25])).logit()
    assert float(middle) == pytest.approx(float(0.75 * ends[0] + 0.25 * ends[1]), abs=1e-12)


def test_the_step_is_held_at_both_ends() -> None:
    assert bridge().k_of_s(torch.tensor([0.0, 0.02, 0.95, 1.0])).tolist() == [0, 0, 999, 999]


def test_the_nearest_state_is_the_teachers_own_and_the_tail_keeps_its_time() -> None:
    teacher = bridge()
    s = torch.cat([torch.linspace(0, 1, 501), teacher.s_table[[0, 400, 999]].float()])
    k, snapped = teacher.nearest_state(s)
    assert k.dtype == torch.int64
    tail = s.double() > teacher.s_last + 1e-5  # the grid holds .936, just beyond .93596
    assert torch.equal(snapped[~tail], teacher.s_table[k[~tail]])
    assert torch.equal(snapped[tail], s[tail].double())
    assert (k[tail] == 999).all()
    assert k[-3:].tolist() == [0, 400, 999]
    distance = (teacher.s_table.logit()[None] - s[~tail].double().logit()[:, None]).abs()
    assert torch.equal(k[~tail][1:], distance.argmin(1)[1:])


def test_a_snapped_grid_keeps_its_ends_and_has_only_the_teachers_times_inside() -> None:
    teacher = bridge()
    grid = teacher.snap_grid(uniform_grid(200))
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    body = grid[(grid < teacher.s_last) & (grid > 0)]
    assert torch.isin(body, teacher.s_table).all()
    assert float((teacher.snap_grid(uniform_grid(25)) - uniform_grid(25)).abs().max()) < 2e-3


def test_the_teacher_input_has_unit_variance_for_unit_data() -> None:
    s = torch.tensor([0.0, 0.1, 0.5, 0.93, 0.97, 1.0], dtype=torch.float64)
    inputs = bridge().teacher_input(torch.ones(6, 1, 1, 1, dtype=torch.float64), s).flatten()
    torch.testing.assert_close(inputs**2 * (s**2 + (1 - s) ** 2), torch.ones_like(s))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_in_the_tail_the_line_leads_to_the_picture_that_the_last_step_sees(prediction_type: PredictionType) -> None:
    teacher = bridge(prediction_type)
    x, s, k = noise(2, 3, 4, 5), torch.tensor([0.95, 1.0], dtype=torch.float64), torch.full((2,), 999)
    x_vp, abar = teacher.teacher_input(x, s), teacher.schedule.alpha_bar[999]
    output = network(x_vp, k)
    if prediction_type == "epsilon":
        x0_hat = (x_vp - (1 - abar).sqrt() * output) / abar.sqrt()
    else:
        x0_hat = abar.sqrt() * x_vp - (1 - abar).sqrt() * output
    v = teacher.velocity(x, s, k, output)
    torch.testing.assert_close(x0_from_velocity(x, v, s), x0_hat, rtol=0, atol=1e-11)
    torch.testing.assert_close(v[1], x[1] - x0_hat[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_holding_is_continuous_where_the_tail_begins(prediction_type: PredictionType) -> None:
    teacher = bridge(prediction_type)
    x, k = noise(1, 3, 4, 5), torch.tensor([999])
    before, at, after = (
        velocity_of(teacher, x, torch.tensor([teacher.s_last + d]).double(), k) for d in (-2e-6, 0, 2e-6)
    )
    scale = float(at.abs().max())
    assert float((before - at).abs().max()) < 1e-3 * scale
    assert float((after - at).abs().max()) < 1e-3 * scale


@pytest.mark.parametrize("tail", get_args(TailPolicy))
def test_the_last_step_is_the_teachers_even_when_its_time_was_stored_in_float32(tail: TailPolicy) -> None:
    teacher = bridge(tail=tail)
    x, k = noise(1, 3, 4, 5), torch.tensor([999])
    exact, stored = (velocity_of(teacher, x, s, k) for s in (teacher.s_of_k(k), teacher.s_of_k(k).float()))
    torch.testing.assert_close(stored, exact, rtol=1e-4, atol=1e-4)


def test_below_the_first_step_the_line_leads_from_the_noise_predicted_at_step_zero() -> None:
    teacher = bridge()
    x, s, k = noise(1, 3, 4, 5), torch.zeros(1, dtype=torch.float64), torch.tensor([0])
    output = network(teacher.teacher_input(x, s), k)
    v = teacher.velocity(x, s, k, output)
    torch.testing.assert_close(v, output - x)
    torch.testing.assert_close(x + per_sample(1 - s, x) * v, output)


def test_the_ends_of_a_straight_line_come_back_from_its_velocity() -> None:
    x0, eps, s = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1), torch.tensor([0.95, 1.0], dtype=torch.float64)
    x = interpolate(x0, eps, s)
    torch.testing.assert_close(x0_from_velocity(x, eps - x0, s), x0)
    torch.testing.assert_close(x + per_sample(1 - s, x) * (eps - x0), eps)


@pytest.mark.parametrize("tail", ["guess", "data"])
def test_a_tail_of_an_unknown_name_is_refused(tail: str) -> None:
    with pytest.raises(Refused, match=f"tail policy '{tail}' is not known - choose one of hold, faithful"):
        Bridge(bridge().schedule, tail)  # type: ignore[arg-type]


def test_without_signal_at_the_last_step_there_is_no_tail() -> None:
    teacher = bridge("v_prediction", rescale=True)
    x, s, k = noise(1, 3, 4, 5), torch.ones(1, dtype=torch.float64), torch.tensor([999])
    assert teacher.s_last == 1
    assert not teacher.in_tail(s).any()
    assert teacher.k_of_s(s).tolist() == [999]
    output = network(x, k)
    torch.testing.assert_close(teacher.velocity(x, s, k, output), x + output)


def test_single_precision_stays_single_and_loses_little() -> None:
    teacher = bridge()
    x, k = noise(2, 3, 4, 5), torch.tensor([10, 999])
    s, output = teacher.s_of_k(k), noise(2, 3, 4, 5, seed=1)
    single = teacher.velocity(x.float(), s.float(), k, output.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), teacher.velocity(x, s, k, output), rtol=1e-5, atol=1e-5)
    assert teacher.velocity(x.half(), s, k, output.half()).dtype == torch.float32
