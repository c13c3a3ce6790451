"""Laws of pruned students and of students with random weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.schedule import NoiseSchedule
from stages.nets.features import feature_widths, last_resnets, with_settings
from stages.nets.graft import graft_time_embedding
from stages.nets.student import Student
from stages.nets.student_shape import (
    Prune,
    StudentConfig,
    count_parameters,
    fits_ldm,
    multiply_adds,
    prune_of,
    prune_unet,
    pruned_config,
)
from stages.system.refusal import Refused
from stages.tiny.anatomy import build_scheduler, build_unet

PRUNED: tuple[Prune, ...] = ("small", "tiny")
SD15 = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768}
SD15 |= {"norm_num_groups": 32, "sample_size": 64, "layers_per_block": 2}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
COND = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
S = torch.tensor([0.3, 0.8])


def with_layers(layers: int) -> UNet2DConditionModel:
    """A teacher of the embedded widths with random weights, none of which is 0."""
    unet = UNet2DConditionModel.from_config(with_settings(build_unet().config, layers_per_block=layers))
    generator = torch.Generator().manual_seed(layers)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return unet.eval()


@pytest.fixture(scope="module")
def teachers() -> Mapping[int, UNet2DConditionModel]:
    return {layers: with_layers(layers) for layers in (1, 2, 3)}


def up_layers(teacher: UNet2DConditionModel, pruned: UNet2DConditionModel) -> dict[int, list[int]]:
    """For each up block the teacher's resnets whose weights the pruned one's have, in order."""
    found: dict[int, list[int]] = {}
    for number, (own, whole) in enumerate(zip(pruned.up_blocks, teacher.up_blocks, strict=True)):
        found[number] = [
            next(j for j, other in enumerate(whole.resnets) if equal(resnet.state_dict(), other.state_dict()))
            for resnet in own.resnets
        ]
    return found


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("prune", PRUNED)
def test_every_layer_that_is_kept_has_the_teachers_weights(
    teachers: Mapping[int, UNet2DConditionModel], layers: int, prune: Prune
) -> None:
    teacher = teachers[layers]
    pruned = prune_unet(teacher, prune)
    own, whole = pruned.state_dict(), teacher.state_dict()
    moved = {name for name in own if name.startswith("up_blocks.") and ".upsamplers." not in name}
    assert all(torch.equal(own[name], whole[name]) for name in own.keys() - moved)
    for number, sources in up_layers(teacher, pruned).items():
        for kind in ("resnets", "attentions"):
            for j, source in enumerate(sources if hasattr(pruned.up_blocks[number], kind) else []):
                layer = getattr(pruned.up_blocks[number], kind)[j].state_dict()
                assert equal(layer, getattr(teacher.up_blocks[number], kind)[source].state_dict())
    assert (pruned.mid_block is None) == (prune == "tiny")


def test_of_the_up_layers_the_second_goes_so_that_the_others_keep_their_skip_connections(
    teachers: Mapping[int, UNet2DConditionModel],
) -> None:
    kept = {layers: up_layers(teachers[layers], prune_unet(teachers[layers], "small")) for layers in teachers}
    assert list(kept[2].values()) == [[0, 2]] * 4
    assert list(kept[3].values()) == [[0, 2, 3]] * 4
    # Of two the last is left where it takes the channels that come from the block before, and where one must go.
    assert kept[1] == {0: [1], 1: [1], 2: [0, 1], 3: [0]}


def test_the_teacher_stays_as_it_is_and_shares_no_memory(teachers: Mapping[int, UNet2DConditionModel]) -> None:
    teacher = teachers[1]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = StudentConfig(prune="tiny").make(teacher, None, 0)
    with torch.no_grad():
        for parameter in student.unet.parameters():
            parameter.zero_()
    assert equal(teacher.state_dict(), before)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("config", "prune", "parameters", "operations"),
    [
        ({}, "small", (0.6, 0.7), (0.6, 0.7)),
        ({}, "tiny", (0.5, 0.6), (0.6, 0.66)),
        (SD15, "small", (0.6, 0.7), (0.6, 0.67)),
        (SD15, "tiny", (0.5, 0.6), (0.6, 0.66)),
    ],
)
def test_tiny_has_about_half_of_the_parameters(
    config: Mapping[str, Any], prune: Prune, parameters: tuple[float, float], operations: tuple[float, float]
) -> None:
    with torch.device("meta"):
        teacher = UNet2DConditionModel.from_config(with_settings(build_unet().config, **config))
        pruned = prune_unet(teacher, prune)
    assert parameters[0] < count_parameters(pruned) / count_parameters(teacher) < parameters[1]
    assert operations[0] < multiply_adds(pruned.config) / multiply_adds(teacher.config) < operations[1]


def test_multiply_adds_of_one_convolution_are_counted_by_hand() -> None:
    """Taking the last convolution's outputs from 4 to 8 adds as many products as that convolution has."""
    config = dict(build_unet().config)
    width, side = config["block_out_channels"][0], config["sample_size"]
    more = multiply_adds(with_settings(config, out_channels=8)) - multiply_adds(config)
    assert more == 4 * width * 9 * side * side


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("prune", PRUNED)
def test_stock_diffusers_loads_it_from_its_config_and_predicts_the_same(
    teachers: Mapping[int, UNet2DConditionModel], layers: int, prune: Prune, tmp_path: Path
) -> None:
    student = StudentConfig(prune=prune).make(teachers[layers], None, 0).eval()
    student.unet.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        velocities = [one.velocity(X, S, COND) for one in (Student(loaded.eval()), student)]
    torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)  # where weights lie in memory changes their rounding


@pytest.mark.parametrize("prune", PRUNED)
def test_only_blocks_with_a_resnet_have_a_feature_and_it_has_the_teachers_width(
    teachers: Mapping[int, UNet2DConditionModel], prune: Prune
) -> None:
    for layers, teacher in teachers.items():
        student = StudentConfig(prune=prune).make(teacher, None, 0)
        widths = feature_widths(teacher)
        gone = {"down_0", "down_2", "down_3"} if layers == 1 else set()
        gone |= {"mid"} if prune == "tiny" else set()
        assert student.blocks == tuple(block for block in widths if block not in gone)
        features = student(X, S, COND, COND[:1]).features
        assert {block: feature.shape[1] for block, feature in features.items()} == {
            block: widths[block] for block in student.blocks
        }


def test_the_graft_is_the_unpruned_students(teachers: Mapping[int, UNet2DConditionModel]) -> None:
    bridge = Bridge(NoiseSchedule.from_config(build_scheduler().config))
    whole, tiny = (StudentConfig(prune=prune).make(teachers[1], None, 0).unet for prune in ("none", "tiny"))
    assert graft_time_embedding(whole, bridge) == graft_time_embedding(tiny, bridge)
    assert equal(whole.time_embedding.state_dict(), tiny.time_embedding.state_dict())


@pytest.mark.parametrize("prune", get_args(Prune))
def test_random_weights_follow_from_the_seed_alone(teachers: Mapping[int, UNet2DConditionModel], prune: Prune) -> None:
    config = StudentConfig(prune=prune, scratch=True)
    first, again, other = (config.make(teachers[1], None, seed).unet for seed in (3, 3, 4))
    assert equal(first.state_dict(), again.state_dict())
    teacher = prune_unet(teachers[1], prune).state_dict()
    weights = {name: value for name, value in first.state_dict().items() if value.dim() > 1}
    assert all(not torch.equal(value, other.state_dict()[name]) for name, value in weights.items())
    assert all(not torch.equal(value, teacher[name]) for name, value in weights.items())


def test_what_a_student_was_pruned_of_is_read_off_its_config(teachers: Mapping[int, UNet2DConditionModel]) -> None:
    for teacher in teachers.values():
        for prune in get_args(Prune):
            assert prune_of(teacher.config, prune_unet(teacher, prune).config) == prune
    with pytest.raises(Refused, match="layers_per_block 3") as refusal:
        prune_of(teachers[1].config, teachers[3].config)
    assert "\n" not in str(refusal.value)


def test_the_ldm_layout_holds_equal_blocks_with_a_middle_one_alone(
    teachers: Mapping[int, UNet2DConditionModel],
) -> None:
    fitting = {(n, prune): fits_ldm(pruned_config(teachers[n].config, prune)) for n in teachers for prune in PRUNED}
    assert fitting == {(n, prune): prune == "small" and n > 1 for n, prune in fitting}
    assert all(fits_ldm(teacher.config) for teacher in teachers.values())


def test_whole_students_leave_no_trace_in_the_identity() -> None:
    assert StudentConfig().identity() == {}
    assert StudentConfig(scratch=True).identity() == {"student": {"prune": "none", "scratch": True}}
    assert [StudentConfig(scratch=one).grafts(None, "velocity") for one in (False, True)] == [True, False]
    assert not StudentConfig().grafts(None, "vp_v")
    assert last_resnets(prune_unet(build_unet(), "none")).keys() == feature_widths(build_unet()).keys()
