from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from stages.convert.delta import add_difference, relative_distance
from stages.nets.features import copy_without_hooks
from stages.nets.student import Student
from stages.system.refusal import Refused
from stages.teacher_files.mix.weights import FAR_DISTANCE
from stages.tiny import anatomy
from tests.convert.conftest import perturbed


def weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


@pytest.mark.parametrize("factor", [1.0, -0.5, 2.0])
def test_each_tensor_of_the_student_takes_the_factor_times_what_the_fine_tune_changed(
    base: UNet2DConditionModel, factor: float
) -> None:
    fine_tune, student = perturbed(base, 0.1), Student(perturbed(base, 0.2, seed=1))
    before, own, other = weights(student.unet), weights(base), weights(fine_tune)
    add_difference(student, base, fine_tune, factor)
    for name, value in student.unet.state_dict().items():
        expected = before[name].double() + factor * (other[name].double() - own[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())
    assert all(torch.equal(value, other[name]) for name, value in fine_tune.state_dict().items())


def test_the_base_as_the_student_becomes_the_fine_tune(base: UNet2DConditionModel) -> None:
    fine_tune, student = perturbed(base, 0.1), Student.from_teacher(base)
    add_difference(student, base, fine_tune)
    for name, value in student.unet.state_dict().items():
        torch.testing.assert_close(value, fine_tune.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_a_fine_tune_with_the_base_s_unet_leaves_every_bit_of_the_student(base: UNet2DConditionModel) -> None:
    student = Student(perturbed(base, 0.2))
    with torch.no_grad():
        student.unet.conv_in.bias.zero_().neg_()
    before = {name: value.numpy().tobytes() for name, value in student.unet.state_dict().items()}
    add_difference(student, base, copy_without_hooks(base))
    assert {name: value.numpy().tobytes() for name, value in student.unet.state_dict().items()} == before


def test_models_of_half_precision_are_added_in_single(base: UNet2DConditionModel) -> None:
    fine_tune = perturbed(base, 0.1)
    halves = [copy_without_hooks(one).half() for one in (base, fine_tune)]
    students = [Student.from_teacher(base) for _ in range(2)]
    add_difference(students[0], *halves)
    add_difference(students[1], *(copy_without_hooks(one) for one in halves))
    for name, value in students[0].unet.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, students[1].unet.state_dict()[name])


def test_a_student_that_is_trained_may_take_a_difference(base: UNet2DConditionModel) -> None:
    student = Student.from_teacher(base).requires_grad_(True)
    add_difference(student, base, perturbed(base, 0.1))
    assert all(value.requires_grad and value.is_leaf for value in student.parameters())


def narrower(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config({**unet.config, "cross_attention_dim": 32})


def deeper(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config({**unet.config, "layers_per_block": 2})


def of_more_heads(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config({**unet.config, "attention_head_dim": 2})


def of_other_groups(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config({**unet.config, "norm_num_groups": 4})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (narrower, "tensors of another shape, such as down_blocks.0.attentions.0"),
        (deeper, "tensors that one of two has alone"),
        (of_more_heads, "attention_head_dim: 2, not 4"),
        (of_other_groups, "norm_num_groups: 4, not 8"),
    ],
)
def test_another_anatomy_is_refused_on_one_line(
    base: UNet2DConditionModel, change: Callable[[UNet2DConditionModel], UNet2DConditionModel], named: str
) -> None:
    other = change(base)
    for call in (
        lambda: add_difference(Student.from_teacher(base), base, other),
        lambda: add_difference(Student(other), base, base),
        lambda: relative_distance(base, other),
        lambda: relative_distance(other, base),
    ):
        with pytest.raises(Refused) as refusal:
            call()
        assert "\n" not in str(refusal.value)
        assert " - " in str(refusal.value)
    with pytest.raises(Refused, match=named):
        relative_distance(base, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_sum_that_is_not_finite_is_refused_by_name(base: UNet2DConditionModel, value: float) -> None:
    fine_tune = copy_without_hooks(base)
    with torch.no_grad():
        fine_tune.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(Refused, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        add_difference(Student.from_teacher(base), base, fine_tune, 2.0)


def test_a_counter_stays_and_refuses_another_value(base: UNet2DConditionModel) -> None:
    models = [copy_without_hooks(base) for _ in range(3)]
    for model, count in zip(models, (7, 7, 8), strict=True):
        model.register_buffer("count", torch.tensor(count))
    own, same, other = models
    student = Student(copy_without_hooks(base))
    student.unet.register_buffer("count", torch.tensor(9))
    add_difference(student, own, same)
    assert int(student.unet.count) == 9
    with pytest.raises(Refused, match="count"):
        add_difference(student, own, other)


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5])
def test_a_small_change_is_as_far_as_its_share_of_the_weights(base: UNet2DConditionModel, scale: float) -> None:
    fine_tune = perturbed(base, scale)
    assert relative_distance(base, base) == 0
    assert relative_distance(base, fine_tune) == pytest.approx(scale, rel=0.15)
    assert relative_distance(base, fine_tune) == pytest.approx(relative_distance(fine_tune, base))
    assert relative_distance(base, fine_tune) < FAR_DISTANCE


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_unrelated_weights_of_any_scale_are_far(base: UNet2DConditionModel, scale: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unrelated = anatomy.build_unet()
    with torch.no_grad():
        for value in unrelated.parameters():
            value *= scale
    assert relative_distance(base, unrelated) == pytest.approx(2**0.5, rel=0.01)
    assert relative_distance(unrelated, base) > FAR_DISTANCE


def test_one_tensor_that_exploded_makes_no_foreign_model(base: UNet2DConditionModel) -> None:
    fine_tune = perturbed(base, 0.05)
    with torch.no_grad():
        fine_tune.time_embedding.linear_2.weight *= 1000
    assert relative_distance(base, fine_tune) < FAR_DISTANCE
