"""Laws of pictures that teach themselves: what is drawn for them, and what of it counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.batch import Batch, concatenate
from shards.record import BlockFeatures, Record, States
from stages.classes.mixture import DataTarget
from stages.flow.solver import apply_guidance, remove_guidance
from stages.flow.timesteps import TimestepDensity
from stages.nets.student import Prediction
from stages.system.refusal import Refused
from stages.train.losses import FeatureScale
from stages.train.objective import Losses, Objective, ObjectiveConfig

DENSITY = TimestepDensity()
BLOCKS = ("mid", "up_3")
SCALE = FeatureScale({block: torch.ones(1, 3) for block in BLOCKS})


def record(key: str, guidance_scale: float) -> Record:
    state, x0 = torch.zeros(1, 3, 4, 5).half(), torch.full((3, 4, 5), 0.25).half()
    draws = States(torch.tensor([1]), torch.tensor([0.1]), state, state, state, torch.tensor([False]))
    head = (key, "a picture", "star/red", 0, guidance_scale)
    return Record(*head, torch.zeros(6, 7).half(), x0, draws, BlockFeatures({"mid": torch.zeros(1, 3).half()}))


@pytest.fixture
def target() -> DataTarget:
    """The first of the two pictures of the batch teaches itself."""
    return DataTarget.from_records([record("000000000", 4.0)], {}, seed=3, density=DENSITY)


def numbers(*samples: int) -> np.ndarray:
    return np.array(samples)


def output(batch: Batch, seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)

    def off(values: Tensor) -> Tensor:
        return (values.float() + torch.randn(values.shape, generator=generator)).requires_grad_(True)

    return Prediction(off(batch.v_cond), off(batch.v_uncond), {b: off(f) for b, f in batch.features.items()})


def losses(said: Prediction, batch: Batch) -> Losses:
    objective = Objective(ObjectiveConfig(uncond_weight=0.5), BLOCKS, SCALE)
    return objective(said, batch, torch.tensor([1.0, 2.0]), 0.05, torch.tensor([1.5, 6.0]))


def test_a_state_and_its_velocity_lead_back_to_the_picture(batch, target):
    put = target.put(batch, numbers(10, 11))
    back = put.x_t[0] - put.s[0] * put.v_cond[0]
    torch.testing.assert_close(back, target.x0["000000000"].float(), atol=1e-5, rtol=0)
    assert put.own_guidance is not None
    assert put.own_guidance.tolist() == [4, 0]


def test_noise_and_time_belong_to_the_number_of_the_sample_and_to_nothing_else(batch, target):
    one, again = target.put(batch, numbers(10, 11)), target.put(batch.rows(slice(0, 1)), numbers(10))
    assert torch.equal(one.x_t[0], again.x_t[0])
    assert torch.equal(one.s[0], again.s[0])
    assert not torch.equal(one.x_t[0], target.put(batch, numbers(12, 11)).x_t[0])
    assert not torch.equal(one.x_t[0], replace(target, seed=4).put(batch, numbers(10, 11)).x_t[0])


def test_the_other_rows_stay_as_they_are_stored(batch, target):
    put = target.put(batch, numbers(10, 11))
    for name in ("x_t", "v_cond", "v_uncond", "s", "k", "cond"):
        assert torch.equal(getattr(put, name)[1], getattr(batch, name)[1])
    assert target.put(batch.rows(slice(1, 2)), numbers(11)).own_guidance is None


def test_times_follow_the_density(batch, target):
    row = batch.rows(slice(0, 1))
    s = torch.cat([target.put(row, numbers(number)).s for number in range(400)])
    places = DENSITY.cdf(s)
    assert abs(float(places.mean()) - 0.5) < 3 * 12**-0.5 / 20
    assert float(places.min()) < 0.02
    assert float(places.max()) > 0.98


def test_a_picture_is_drawn_at_the_scale_that_painted_it_unless_told():
    found = DataTarget.from_records(
        [record("000000001", 6.0), record("000000007", 1.0)], {"000000007": 3.0}, 0, DENSITY
    )
    assert found.guidance == {"000000001": 6.0, "000000007": 3.0}


def test_a_picture_that_was_hardly_guided_is_refused_as_data():
    with pytest.raises(Refused, match=r"record 000000007 .* painted at guidance 0.5 - paint at guidance 1 or above"):
        DataTarget.from_records([record("000000001", 1.0), record("000000007", 0.5)], {}, 0, DENSITY)


def test_rows_that_were_all_answered_lose_the_very_bits_of_rows_that_tell_nothing(batch):
    told = replace(batch, own_guidance=torch.zeros(2))
    one, two = output(batch), output(told)
    lost, lost_too = losses(one, batch), losses(two, told)
    lost.total.backward()
    lost_too.total.backward()
    assert all(torch.equal(a, b) for a, b in zip(vars(lost).values(), vars(lost_too).values(), strict=True))
    assert torch.equal(one.v_cond.grad, two.v_cond.grad)
    assert torch.equal(one.v_uncond.grad, two.v_uncond.grad)
    assert torch.equal(one.features["mid"].grad, two.features["mid"].grad)


def test_of_a_row_that_teaches_itself_only_the_conditional_branch_counts(batch):
    asked = replace(batch, own_guidance=torch.tensor([1.0, 0.0]))
    said = output(batch)
    found = losses(said, asked)
    found.total.backward()
    conditional = (said.v_cond[0] - batch.v_cond[0]).square().mean()
    assert found.flow_errors[0].item() == pytest.approx(conditional.item())
    assert found.guidance_errors[0] == 0
    assert found.block_errors[:, 0].tolist() == [0, 0]
    assert said.v_uncond.grad[0].abs().sum() == 0
    assert said.v_uncond.grad[1].abs().sum() > 0
    assert said.features["mid"].grad[0].abs().sum() == 0
    torch.testing.assert_close(said.v_cond.grad[0], (said.v_cond[0] - batch.v_cond[0]).detach() / 60)  # 2 / (2 x 60)


def test_a_row_that_teaches_itself_has_nothing_to_learn_where_guidance_at_its_scale_draws_it(batch):
    asked = replace(batch, own_guidance=torch.tensor([4.0, 0.0]))
    v_uncond = torch.randn(batch.v_cond.shape, generator=torch.Generator().manual_seed(5))
    v_cond = remove_guidance(batch.v_cond.float(), v_uncond, 4.0).requires_grad_(True)
    found = losses(Prediction(v_cond, v_uncond, batch.features), asked)
    found.total.backward()
    torch.testing.assert_close(apply_guidance(v_cond, v_uncond, 4.0)[0], batch.v_cond[0].float())
    assert found.flow_errors[0] < 1e-12
    assert v_cond.grad[0].abs().max() < 1e-7
    assert found.flow_errors[1] > 0.01


def test_rows_that_tell_nothing_count_as_answered_beside_others(batch):
    apart = replace(batch, own_guidance=torch.tensor([3.0, 0.0]))
    both = concatenate([batch, apart])
    assert both.own_guidance is not None
    assert both.own_guidance.tolist() == [0, 0, 3, 0]
    assert both.rows(slice(0, None, 2)).own_guidance.tolist() == [0, 3]
    assert both.to("cpu", torch.float32).own_guidance.tolist() == both.own_guidance.tolist()
    assert concatenate([batch, batch]).own_guidance is None
