"""What a network predicts is seen in its answers, whatever its files state."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.path import per_sample
from stages.flow.schedule import NoiseSchedule, rescale_zero_terminal_snr, unscaled_alpha_bar
from stages.nets.components import load_components
from stages.nets.measured_teacher import load_measured_teacher, used_prediction
from stages.nets.prediction import MeasuredPrediction, expected_slopes, measure_network, measured_steps
from stages.nets.teacher import Teacher
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherSource
from tests.single_files import ldm_tensors, saved
from tests.v_teachers import EMBEDDED, LABELS, SCHEDULER, label

CPU = torch.device("cpu")
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULES = {
    "SD1.5's": SCALED,
    "of 200 steps": {**SCALED, "beta_start": 0.00425, "beta_end": 0.06, "num_train_timesteps": 200},
    "linear": {**SCALED, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.008},
}
RESULTS = {"epsilon": ("epsilon", False), "v": ("v_prediction", False), "v, zero terminal SNR": ("v_prediction", True)}
COND = torch.zeros(2, 1, 1)


def gaussian_network(kind: str, alpha_bar: Tensor, variance: float) -> Callable[[Tensor, int, Tensor], Tensor]:
    """The best network for data of independent Gaussian values of this variance."""

    def network(x: Tensor, k: int, cond: Tensor) -> Tensor:
        alpha, sigma = float(alpha_bar[k].sqrt()), float((1 - alpha_bar[k]).sqrt())
        x0 = alpha * variance / (alpha**2 * variance + sigma**2) * x
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]

    return network


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", [0.05, 0.3])
def test_the_expected_slopes_are_those_of_the_best_network_for_gaussian_data(kind: Any, variance: float) -> None:
    alpha_bar = unscaled_alpha_bar(SCALED)
    network = gaussian_network(kind, alpha_bar, variance)
    measured = measure_network(network, COND, (4, 8, 8), alpha_bar)
    expected = expected_slopes(kind, alpha_bar[list(measured.steps)], variance)
    assert measured.slopes == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("variance", [0.05, 0.2, 0.25])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RESULTS)
def test_each_prediction_is_seen_on_any_schedule_and_for_any_detail(schedule: str, variance: float, name: str) -> None:
    plain = unscaled_alpha_bar(SCHEDULES[schedule])
    kind, zero = RESULTS[name]
    network = gaussian_network(kind, rescale_zero_terminal_snr(plain) if zero else plain, variance)
    measured = measure_network(network, COND, (4, 8, 8), plain)
    assert (measured.prediction_type, measured.zero_terminal_snr) == (kind, zero)
    expected = (0.2 * variance) ** 0.5 if kind == "v_prediction" else 0.2
    assert measured.fine_variance == pytest.approx(expected, rel=0.2)


def test_schedules_that_hardly_differ_are_not_told_apart() -> None:
    cosine = unscaled_alpha_bar({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000})
    measured = measure_network(gaussian_network("v_prediction", cosine, 0.2), COND, (4, 8, 8), cosine)
    assert (measured.prediction_type, measured.zero_terminal_snr) == ("v_prediction", None)


def test_a_network_that_answers_with_the_data_is_seen_and_refused() -> None:
    parts = load_components(str(EMBEDDED), CPU, torch.float32)
    alpha_bar, unet = parts.schedule.alpha_bar, parts.unet

    def network(x: Tensor, k: int, cond: Tensor) -> Tensor:
        alpha, sigma = float(alpha_bar[k].sqrt()), float((1 - alpha_bar[k]).sqrt())
        return (x - sigma * unet(x, torch.tensor(k), cond).sample) / alpha

    with torch.inference_mode():
        cond = Teacher(parts, "hold").encode_texts(["", "a red star"])
        measured = measure_network(network, cond, (4, 8, 8), alpha_bar)
    assert measured.prediction_type == "sample"
    with pytest.raises(Refused, match="prediction type sample"):
        used_prediction(TeacherSource(location="x"), {}, measured, parts.schedule)


@pytest.mark.parametrize("name", ["v", "v, zero terminal SNR"])
def test_the_embedded_teachers_answers_read_as_v_are_seen_as_v_on_their_schedule(name: str) -> None:
    teacher = Teacher(load_components(str(EMBEDDED), CPU, torch.float32), "hold")
    plain, unet = teacher.components.schedule.alpha_bar, teacher.components.unet
    alpha_bar = rescale_zero_terminal_snr(plain) if RESULTS[name][1] else plain
    bridge = Bridge(NoiseSchedule(alpha_bar, "v_prediction"))

    def network(x: Tensor, k: int, cond: Tensor) -> Tensor:
        rows = torch.full((len(x),), k)
        s = bridge.s_of_k(rows)
        linear, own = x.double() * per_sample((s**2 + (1 - s) ** 2).sqrt(), x), teacher.bridge.k_of_s(s)
        v = teacher.bridge.velocity(linear, s, own, unet(x, own.float(), cond).sample.double())
        x0, eps = linear - per_sample(s, x) * v, linear + per_sample(1 - s, x) * v
        return (float(alpha_bar[k].sqrt()) * eps - float((1 - alpha_bar[k]).sqrt()) * x0).float()

    with torch.inference_mode():
        measured = measure_network(network, teacher.encode_texts(["", "a red star"]), (4, 8, 8), plain)
    assert (measured.prediction_type, measured.zero_terminal_snr) == RESULTS[name]


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_are_undecided_and_what_is_stated_is_taken(seed: int, tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED, tmp_path / "random")
    torch.manual_seed(seed)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    label(folder, "v, zero terminal SNR")
    teacher = load_measured_teacher(TeacherSource(location=str(folder)), CPU)
    assert teacher.measured.prediction_type is None
    assert (teacher.used.prediction_type, teacher.used.zero_terminal_snr) == ("v_prediction", True)
    assert "no trained model" in teacher.used.lines[-1]
    assert teacher.components.folder == folder


def test_measuring_changes_no_state_of_torch() -> None:
    parts = load_components(str(EMBEDDED), CPU, torch.float32)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    load_measured_teacher(TeacherSource(location=str(EMBEDDED)), CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(not value.requires_grad for value in parts.unet.parameters())


@pytest.mark.parametrize("stated", LABELS)
@pytest.mark.parametrize("true", LABELS)
def test_nine_of_nine_a_right_label_passes_and_a_wrong_one_is_refused(
    true: str, stated: str, teachers_by_prediction: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(teachers_by_prediction[true], tmp_path / "teacher")
    label(folder, stated)
    source = TeacherSource(location=str(folder))
    if stated == true:
        teacher = load_measured_teacher(source, CPU)
        assert (teacher.used.prediction_type, teacher.used.zero_terminal_snr) == RESULTS[true]
        assert teacher.components.folder == folder
        return
    with pytest.raises(Refused, match="its network answers as") as refusal:
        load_measured_teacher(source, CPU)
    kind, zero = RESULTS[true]
    way_out = {"prediction": kind, "zero_terminal_snr": str(zero).lower()}
    assert f"--teacher.prediction {kind} --teacher.zero-terminal-snr {str(zero).lower()}" in str(refusal.value)
    teacher = load_measured_teacher(source.model_copy(update=way_out), CPU)
    schedule = teacher.components.schedule
    assert (schedule.prediction_type, schedule.has_zero_terminal_snr) == RESULTS[true]
    assert "warning" not in "".join(teacher.used.lines)


@pytest.mark.parametrize("name", LABELS)
def test_of_a_single_file_without_a_label_the_measured_prediction_is_taken(
    name: str, teachers_by_prediction: Mapping[str, Path], tmp_path: Path
) -> None:
    file = saved(tmp_path / "model.safetensors", ldm_tensors(teachers_by_prediction[name]))
    teacher = load_measured_teacher(TeacherSource(location=str(file), config=str(EMBEDDED)), CPU)
    schedule = teacher.components.schedule
    assert (schedule.prediction_type, schedule.has_zero_terminal_snr) == RESULTS[name]
    again = load_components(teacher.source, CPU, torch.float32).schedule  # as a worker opens it
    assert torch.equal(again.alpha_bar, schedule.alpha_bar)
    assert again.prediction_type == schedule.prediction_type


def measured_as(kind: Any, zero: bool | None) -> MeasuredPrediction:
    return MeasuredPrediction((999,), (0.0,), {}, {}, 0.2, kind, zero)


SCHEDULE = NoiseSchedule.from_config(json.loads((EMBEDDED / SCHEDULER).read_text()))


def test_a_choice_against_the_measurement_is_taken_with_a_warning() -> None:
    source = TeacherSource(location="x", prediction="v_prediction", zero_terminal_snr="true")
    used = used_prediction(source, {"prediction_type": "epsilon"}, measured_as("epsilon", False), SCHEDULE)
    assert (used.prediction_type, used.zero_terminal_snr) == ("v_prediction", True)
    assert "warning: --teacher.prediction v_prediction" in used.lines[0]
    used = used_prediction(source, {}, measured_as("v_prediction", False), SCHEDULE)
    assert "warning: --teacher.zero-terminal-snr true" in used.lines[0]


@pytest.mark.parametrize(("stated", "zero"), [({}, False), ({"zero_terminal_snr": True}, True)])
def test_where_the_last_step_cannot_be_seen_what_is_stated_is_taken(stated: dict[str, Any], zero: bool) -> None:
    used = used_prediction(TeacherSource(location="x"), stated, measured_as("v_prediction", None), SCHEDULE)
    assert (used.prediction_type, used.zero_terminal_snr) == ("v_prediction", zero)


def test_betas_that_end_without_signal_need_no_rescaling() -> None:
    alpha_bar = rescale_zero_terminal_snr(SCHEDULE.alpha_bar)
    ended = replace(SCHEDULE, alpha_bar=alpha_bar, prediction_type="v_prediction")
    stated = {"prediction_type": "v_prediction", "zero_terminal_snr": False}
    used = used_prediction(TeacherSource(location="x"), stated, measured_as("v_prediction", None), ended)
    assert used.zero_terminal_snr


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_measured_steps_rise_to_the_last(steps: int) -> None:
    alpha_bar = torch.linspace(0.9, 0.01, steps, dtype=torch.float64)
    measured = measured_steps(alpha_bar)
    assert measured[-1] == steps - 1
    assert list(measured) == sorted(set(measured))
