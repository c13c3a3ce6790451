"""Laws of the block form by the teacher's norm, and of the data target."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shards.batch import Batch
from stages.flow.path import interpolate
from stages.nets.student import Prediction
from stages.train.losses import FeatureScale, Losses, data_velocity, teacher_norm_errors
from stages.train.objective import Objective, ObjectiveConfig
from tests.train.conftest import BLOCKS, make_batch

LAMBDAS, SCALES = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 7.0])


def features(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {block: torch.randn(2, 3, generator=generator) for block in BLOCKS}


def test_the_error_over_the_teachers_norm_is_a_pure_number() -> None:
    student, teacher = features(0), features(1)
    errors = teacher_norm_errors(student, teacher)
    scaled = ({block: 7 * value for block, value in one.items()} for one in (student, teacher))
    torch.testing.assert_close(teacher_norm_errors(*scaled), errors)
    assert torch.equal(teacher_norm_errors(teacher, teacher), torch.zeros(2, 2))
    torch.testing.assert_close(teacher_norm_errors({b: torch.zeros(2, 3) for b in BLOCKS}, teacher), torch.ones(2, 2))
    first = BLOCKS[0]
    by_hand = (student[first][0] - teacher[first][0]).norm() ** 2 / teacher[first][0].norm() ** 2
    torch.testing.assert_close(errors[0, 0], by_hand)
    assert bool(teacher_norm_errors(student, {b: torch.zeros(2, 3) for b in BLOCKS}).isfinite().all())


def test_it_is_the_block_term_where_it_is_configured() -> None:
    batch, own = make_batch(0).to("cpu", torch.float32), features(0)
    objective = Objective(ObjectiveConfig(block_form="teacher_norm"), BLOCKS)
    losses = objective(Prediction(batch.v_cond, batch.v_uncond, own), batch, LAMBDAS, 0.5, SCALES)
    expected = teacher_norm_errors(own, {block: batch.features[block] for block in BLOCKS})
    assert torch.equal(losses.block_errors, expected)
    torch.testing.assert_close(losses.total, 0.5 * (LAMBDAS * expected.mean(dim=1)).sum())


def with_picture(noise_seed: int) -> tuple[Batch, Tensor]:
    """Rows that are their pictures under noise, and the velocity eps - x0."""
    generator = torch.Generator().manual_seed(noise_seed)
    batch = make_batch(0).to("cpu", torch.float32)
    x0, eps = (torch.randn(batch.x_s.shape, generator=generator) for _ in range(2))
    s = 0.1 + 0.8 * batch.s
    return replace(batch, x0=x0, s=s, x_s=interpolate(x0, eps, s)), eps - x0


def losses_of(v_cond: Tensor, batch: Batch, target: str) -> Losses:
    config = ObjectiveConfig.model_validate({"velocity_target": target})
    scale = FeatureScale({block: torch.ones(1, 3) for block in BLOCKS})
    output = Prediction(v_cond, batch.v_uncond, dict(batch.features))
    return Objective(config, BLOCKS, scale)(output, batch, LAMBDAS, 0.5, SCALES)


def test_the_data_target_is_noise_minus_picture_in_both_terms_and_the_teachers_is_not_seen() -> None:
    batch, velocity = with_picture(5)
    torch.testing.assert_close(data_velocity(batch.x_s, batch.s, batch.x0), velocity, atol=1e-5, rtol=1e-5)
    assert float(losses_of(velocity, batch, "data").total) < 1e-9
    assert float(losses_of(velocity, batch, "teacher").total) > 0.1
    assert float(losses_of(batch.v_cond, batch, "teacher").total) == 0
    other_teacher = replace(batch, v_cond=torch.randn(batch.v_cond.shape))
    assert torch.equal(losses_of(velocity, other_teacher, "data").total, losses_of(velocity, batch, "data").total)


def test_the_data_target_needs_the_pictures() -> None:
    batch = make_batch(0).to("cpu", torch.float32)
    with pytest.raises(ValueError, match="read with x0"):
        losses_of(batch.v_cond, batch, "data")


def test_only_another_target_is_part_of_the_identity() -> None:
    assert "velocity_target" not in ObjectiveConfig().identity()
    assert ObjectiveConfig(velocity_target="data").identity()["velocity_target"] == "data"
