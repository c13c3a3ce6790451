"""Rows with their own picture as target: their states, and their terms of the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.batch import Batch, concatenate
from shards.record import BlockFeatures, Record, States
from stages.classes.mixture import DataTarget
from stages.flow.solver import apply_guidance, remove_guidance
from stages.flow.timesteps import TimestepDensity, shift_time
from stages.nets.student import Prediction
from stages.system.refusal import Refused
from stages.train.losses import FeatureScale, Losses
from stages.train.objective import Objective, ObjectiveConfig

DENSITY = TimestepDensity()
BLOCKS = ("mid", "up_3")
SCALE = FeatureScale({block: torch.ones(1, 3) for block in BLOCKS})


def record(key: str, guidance_scale: float) -> Record:
    state, x0 = torch.zeros(1, 3, 4, 5).half(), torch.full((3, 4, 5), 0.25).half()
    states = States(torch.tensor([1]), torch.tensor([0.1]), state, state, state, torch.tensor([False]))
    head = (key, "a picture", "star/red", 0, guidance_scale)
    return Record(*head, torch.zeros(6, 7).half(), x0, states, BlockFeatures({"mid": torch.zeros(1, 3).half()}))


@pytest.fixture
def target() -> DataTarget:
    """The first of the two rows of the batch has its own picture as target."""
    return DataTarget.from_records([record("000000000", 4.0)], {}, seed=3, density=DENSITY)


def numbers(*samples: int) -> np.ndarray:
    return np.array(samples)


def output(batch: Batch, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)

    def off(values: Tensor) -> Tensor:
        return (values.float() + torch.randn(values.shape, generator=generator)).requires_grad_(True)

    return Prediction(off(batch.v_cond), off(batch.v_uncond), {b: off(f) for b, f in batch.features.items()})


def losses(prediction: Prediction, batch: Batch) -> Losses:
    objective = Objective(ObjectiveConfig(uncond_weight=0.5), BLOCKS, SCALE)
    return objective(prediction, batch, torch.tensor([1.0, 2.0]), 0.05, torch.tensor([1.5, 6.0]))


def test_a_state_and_its_velocity_lead_back_to_the_picture(batch, target):
    changed = target.apply(batch, numbers(10, 11))
    back = changed.x_s[0] - changed.s[0] * changed.v_cond[0]
    torch.testing.assert_close(back, target.x0["000000000"].float(), atol=1e-5, rtol=0)
    assert changed.own_guidance is not None
    assert changed.own_guidance.tolist() == [4, 0]


def test_noise_and_time_belong_to_the_number_of_the_sample_and_to_nothing_else(batch, target):
    one, again = target.apply(batch, numbers(10, 11)), target.apply(batch.rows(slice(0, 1)), numbers(10))
    assert torch.equal(one.x_s[0], again.x_s[0])
    assert torch.equal(one.s[0], again.s[0])
    assert not torch.equal(one.x_s[0], target.apply(batch, numbers(12, 11)).x_s[0])
    assert not torch.equal(one.x_s[0], replace(target, seed=4).apply(batch, numbers(10, 11)).x_s[0])


def test_the_other_rows_stay_as_they_are_stored(batch, target):
    changed = target.apply(batch, numbers(10, 11))
    for name in ("x_s", "v_cond", "v_uncond", "s", "k", "cond"):
        assert torch.equal(getattr(changed, name)[1], getattr(batch, name)[1])
    assert target.apply(batch.rows(slice(1, 2)), numbers(11)).own_guidance is None


def test_times_follow_the_density(batch, target):
    row = batch.rows(slice(0, 1))
    s = torch.cat([target.apply(row, numbers(number)).s for number in range(400)])
    places = DENSITY.uniform_share * s + (1 - DENSITY.uniform_share) * shift_time(s, 1 / DENSITY.shift)
    assert abs(float(places.mean()) - 0.5) < 3 * 12**-0.5 / 20
    assert float(places.min()) < 0.02
    assert float(places.max()) > 0.98


def test_the_guidance_scale_is_that_of_the_picture_unless_overridden():
    target = DataTarget.from_records(
        [record("000000001", 6.0), record("000000007", 1.0)], {"000000007": 3.0}, 0, DENSITY
    )
    assert target.guidance == {"000000001": 6.0, "000000007": 3.0}


def test_a_picture_with_guidance_below_one_is_refused_as_data():
    with pytest.raises(Refused, match=r"record 000000007 .* guidance 0\.5 - .* guidance 1 or above"):
        DataTarget.from_records([record("000000001", 1.0), record("000000007", 0.5)], {}, 0, DENSITY)


def test_rows_without_own_pictures_have_the_same_loss_bits_as_unmarked_rows(batch):
    marked = replace(batch, own_guidance=torch.zeros(2))
    one, two = output(batch), output(marked)
    unmarked_loss, marked_loss = losses(one, batch), losses(two, marked)
    unmarked_loss.total.backward()
    marked_loss.total.backward()
    assert all(torch.equal(a, b) for a, b in zip(vars(unmarked_loss).values(), vars(marked_loss).values(), strict=True))
    assert torch.equal(one.v_cond.grad, two.v_cond.grad)
    assert torch.equal(one.v_uncond.grad, two.v_uncond.grad)
    assert torch.equal(one.features["mid"].grad, two.features["mid"].grad)


def test_of_a_row_with_its_own_picture_only_the_conditional_branch_counts(batch):
    marked = replace(batch, own_guidance=torch.tensor([1.0, 0.0]))
    prediction = output(batch)
    loss = losses(prediction, marked)
    loss.total.backward()
    conditional = (prediction.v_cond[0] - batch.v_cond[0]).square().mean()
    assert loss.flow_errors[0].item() == pytest.approx(conditional.item())
    assert loss.guidance_errors[0] == 0
    assert loss.block_errors[:, 0].tolist() == [0, 0]
    assert prediction.v_uncond.grad[0].abs().sum() == 0
    assert prediction.v_uncond.grad[1].abs().sum() > 0
    assert prediction.features["mid"].grad[0].abs().sum() == 0
    torch.testing.assert_close(
        prediction.v_cond.grad[0], (prediction.v_cond[0] - batch.v_cond[0]).detach() / 60
    )  # 2 / (2 x 60)


def test_a_row_with_its_own_picture_has_no_error_where_guidance_at_its_scale_reaches_it(batch):
    marked = replace(batch, own_guidance=torch.tensor([4.0, 0.0]))
    v_uncond = torch.randn(batch.v_cond.shape, generator=torch.Generator().manual_seed(5))
    v_cond = remove_guidance(batch.v_cond.float(), v_uncond, 4.0).requires_grad_(True)
    loss = losses(Prediction(v_cond, v_uncond, batch.features), marked)
    loss.total.backward()
    torch.testing.assert_close(apply_guidance(v_cond, v_uncond, 4.0)[0], batch.v_cond[0].float())
    assert loss.flow_errors[0] < 1e-12
    assert v_cond.grad[0].abs().max() < 1e-7
    assert loss.flow_errors[1] > 0.01


def test_unmarked_rows_count_as_teacher_rows_beside_others(batch):
    apart = replace(batch, own_guidance=torch.tensor([3.0, 0.0]))
    both = concatenate([batch, apart])
    assert both.own_guidance is not None
    assert both.own_guidance.tolist() == [0, 0, 3, 0]
    assert both.rows(slice(0, None, 2)).own_guidance.tolist() == [0, 3]
    assert both.to("cpu", torch.float32).own_guidance.tolist() == both.own_guidance.tolist()
    assert concatenate([batch, batch]).own_guidance is None
