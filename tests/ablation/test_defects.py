"""Laws of the original's defects, as changes of the rows to train on."""

from dataclasses import replace

import pytest
import torch

from shards.batch import Batch
from stages.ablation.defects import alteration_of, default_bridge, default_schedule, noise_input
from stages.nets.components import load_components
from stages.nets.teacher import Teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components("stages/tiny/model", torch.device("cpu"), torch.float32), "hold")


@pytest.fixture(scope="module")
def batch(teacher: Teacher) -> Batch:
    """Three states with the teacher's own answers."""
    k = torch.tensor([10, 400, 990])
    s = teacher.bridge.s_of_k(k).float()
    x_s = torch.randn(3, *teacher.components.latent_shape(), generator=torch.Generator().manual_seed(0)).half()
    cond = teacher.encode_texts(["a star", "a heart", "a moon"]).clone()
    output = teacher.predict(x_s.float(), s, k, cond, teacher.uncond)
    return Batch(
        keys=("a", "b", "c"), texts=("",) * 3, class_names=("",) * 3, cond=cond, x_s=x_s, s=s, k=k,
        v_cond=output.v_cond.clone().half(), v_uncond=output.v_uncond.clone().half(),
        features={name: values.clone().half() for name, values in output.features.items()},
        state_index=torch.tensor([0, 1, 2]),
    )  # fmt: skip


def test_noise_is_of_unit_variance_on_the_teachers_path_at_every_time(batch: Batch, teacher: Teacher) -> None:
    changed = noise_input(batch, teacher)
    seen = teacher.bridge.teacher_input(changed.x_s.double(), changed.s.double())
    assert seen.flatten(1).std(1).tolist() == pytest.approx([1.0] * 3, abs=0.1)
    assert torch.equal(changed.s, batch.s)


def test_the_teacher_answers_at_the_noise(batch: Batch, teacher: Teacher) -> None:
    changed = noise_input(batch, teacher)
    expected = teacher.predict(changed.x_s.float(), batch.s, batch.k, batch.cond, teacher.uncond)
    assert torch.allclose(changed.v_cond.float(), expected.v_cond, atol=2e-2, rtol=2e-3)
    assert torch.allclose(changed.features["mid"].float(), expected.features["mid"], atol=2e-2, rtol=2e-3)
    assert not changed.v_cond.is_inference()


def test_the_noise_of_a_state_does_not_depend_on_its_batch(batch: Batch, teacher: Teacher) -> None:
    whole, alone = noise_input(batch, teacher), noise_input(batch.rows(slice(1, 2)), teacher)
    assert torch.equal(whole.x_s[1:2], alone.x_s)
    other = replace(batch, state_index=batch.state_index + 1)
    assert not torch.equal(noise_input(other, teacher).x_s, whole.x_s)


def test_the_default_schedule_keeps_the_networks_input_and_its_prediction(batch: Batch, teacher: Teacher) -> None:
    changed, wrong = default_schedule(batch, teacher), default_bridge(teacher)
    own_input, wrong_input = (
        bridge.teacher_input(one.x_s.double(), one.s.double())
        for bridge, one in ((teacher.bridge, batch), (wrong, changed))
    )
    assert torch.allclose(own_input, wrong_input, atol=1e-3)
    own_eps, wrong_eps = (
        one.x_s.double() + (1 - one.s.double())[:, None, None, None] * one.v_cond.double() for one in (batch, changed)
    )
    assert torch.allclose(own_eps, wrong_eps, atol=1e-3)
    assert (changed.s - batch.s).abs().max() > 0.02


def test_the_right_schedule_in_its_place_would_change_nothing(
    batch: Batch, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.ablation.defects.default_bridge", lambda teacher: teacher.bridge)
    changed = default_schedule(batch, teacher)
    assert torch.allclose(changed.v_cond, batch.v_cond.float(), atol=1e-4)
    assert torch.allclose(changed.s, batch.s)


def test_defects_act_in_one_order_and_have_one_name() -> None:
    names = [alteration_of(("default_schedule", "noise_input")), alteration_of(("noise_input", "default_schedule"))]
    assert {alteration.name for alteration in names if alteration} == {"noise_input + default_schedule"}
    assert alteration_of(()) is None
