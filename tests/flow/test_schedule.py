from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from stages.flow.bridge import Bridge
from stages.flow.schedule import NoiseSchedule
from stages.system.refusal import Refused

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
COMPLETE = SD15 | {"_diffusers_version": "0.42.1", "prediction_type": "epsilon"}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_schedule_read_from_a_config_is_the_one_diffusers_makes_of_it(beta_schedule: str, rescale: bool) -> None:
    theirs: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
        beta_schedule=beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=rescale,
    )
    ours = NoiseSchedule.from_config(theirs.config)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert ours.prediction_type == "v_prediction"


def test_trained_betas_come_before_the_named_schedule() -> None:
    betas = [0.1, 0.2, 0.5]
    ours = NoiseSchedule.from_config(COMPLETE | {"num_train_timesteps": 3, "trained_betas": betas})
    assert ours.alpha_bar.tolist() == pytest.approx([0.9, 0.72, 0.36], rel=1e-15)


def test_the_default_schedule_of_the_library_is_another_one() -> None:
    library: Any = DDIMScheduler()  # type: ignore[no-untyped-call]
    default = Bridge(NoiseSchedule.from_config(library.config))
    teacher = Bridge(NoiseSchedule.from_config(COMPLETE))
    assert float((default.s_table - teacher.s_table).abs().max()) > 0.04


@pytest.mark.parametrize("key", ["beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"])
def test_a_missing_entry_is_refused_by_name(key: str) -> None:
    with pytest.raises(Refused, match=f"{key} is missing"):
        NoiseSchedule.from_config({name: value for name, value in COMPLETE.items() if name != key})


def test_a_file_older_than_the_prediction_type_means_epsilon() -> None:
    assert NoiseSchedule.from_config(SD15).prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "sample"),
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("beta_start", -0.1),
        ("beta_end", "0.012"),
        ("num_train_timesteps", 1),
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_an_unsupported_value_is_refused_by_name_in_one_line(key: str, value: Any) -> None:
    with pytest.raises(Refused, match=key) as refusal:
        NoiseSchedule.from_config(COMPLETE | {key: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("betas", [[0.1, 1.2, 0.1], [0.1, 0.0, 0.1], [0.1, -0.2, 0.1]])
def test_betas_outside_zero_and_one_are_refused(betas: list[float]) -> None:
    with pytest.raises(Refused, match="betas"):
        NoiseSchedule.from_config(COMPLETE | {"num_train_timesteps": 3, "trained_betas": betas})
