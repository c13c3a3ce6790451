"""Laws of the frozen teacher: in which precision it computes, and that rows do not mix."""

import pytest
import torch

from stages.flow.bridge import Bridge
from stages.flow.schedule import NoiseSchedule
from stages.nets.components import Components, load_components
from stages.nets.student import Prediction
from stages.nets.teacher import MAX_ERROR_AMPLIFICATION, Teacher, last_low_precision_step

K = torch.tensor([990, 40, 701, 700, 300])
LATE = torch.tensor([True, False, True, False, False])


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("stages/tiny/model", torch.device("cpu"), torch.float32)


def predictions(teacher: Teacher, rows: slice = slice(None)) -> Prediction:
    x = torch.randn(len(K), *teacher.components.latent_shape(), generator=torch.Generator().manual_seed(0))
    cond = teacher.encode_texts([f"a red star, number {i}" for i in range(len(K))])
    s = teacher.bridge.s_of_k(K).float()
    return teacher.predict(x[rows], s[rows], K[rows], cond[rows], teacher.uncond)


@pytest.fixture(scope="module")
def full(parts: Components) -> Prediction:
    return predictions(Teacher(parts, "hold"))


@pytest.fixture(scope="module")
def mixed(parts: Components) -> Prediction:
    return predictions(Teacher(parts, "hold", torch.float16))


def test_half_precision_is_used_where_the_bridge_does_not_magnify_its_error(
    full: Prediction, mixed: Prediction
) -> None:
    for name in ("v_cond", "v_uncond"):
        exact, halved = getattr(full, name), getattr(mixed, name)
        error = (halved - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert (error[LATE] < 1e-5).all()
        assert (error[~LATE] > 1e-5).all()
        assert (error < 0.01).all()


def test_rows_computed_in_two_precisions_come_back_in_their_order(parts: Components, mixed: Prediction) -> None:
    teacher = Teacher(parts, "hold", torch.float16)
    for row in range(len(K)):
        alone = predictions(teacher, slice(row, row + 1))
        torch.testing.assert_close(alone.v_cond[0], mixed.v_cond[row], atol=5e-3, rtol=5e-3)
        for block, feature in alone.features.items():
            torch.testing.assert_close(feature[0], mixed.features[block][row], atol=2e-2, rtol=2e-2)


def test_a_second_teacher_of_the_same_parts_leaves_the_first_as_it_was(parts: Components, full: Prediction) -> None:
    first = Teacher(parts, "hold")
    predictions(Teacher(parts, "hold", torch.float16))
    again = predictions(first)
    assert torch.equal(again.v_cond, full.v_cond)
    assert all(torch.equal(again.features[block], full.features[block]) for block in full.features)


def test_a_recipe_holds_the_precision(parts: Components) -> None:
    assert Teacher(parts, "hold").precision == "float32"
    assert Teacher(parts, "hold", torch.float16).precision == "float16, float32 above k = 700"


@pytest.mark.parametrize("steps", [50, 200, 1000, 4000])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_full_precision_begins_where_errors_are_amplified_too_much_however_many_steps_there_are(
    steps: int, beta_schedule: str
) -> None:
    scale = {"beta_start": 0.85 / steps, "beta_end": 12 / steps}
    config = {**scale, "num_train_timesteps": steps, "beta_schedule": beta_schedule, "prediction_type": "epsilon"}
    bridge = Bridge(NoiseSchedule.from_config(config))
    last = last_low_precision_step(bridge)
    assert 0 < last < steps - 1
    assert 1 / (1 - bridge.s_table[last]) <= MAX_ERROR_AMPLIFICATION < 1 / (1 - bridge.s_table[last + 1])
    if beta_schedule == "scaled_linear":
        assert last / steps == pytest.approx(0.7, abs=0.05)
