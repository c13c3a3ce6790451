import sys
from copy import deepcopy

import pytest
import torch

from stages.system.refusal import Refused
from stages.tiny.anatomy import build_unet
from stages.train.optim import OptimizerConfig, block_of, build_optimizer, learning_rate, set_learning_rate

CONFIG = OptimizerConfig(learning_rate=2.0, warmup_samples=100, final_share=0.1)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [(0, 0.0), (50, 1.0), (100, 2.0), (600, 2.0 * 0.55), (1100, 0.2), (5000, 0.2)],
)
def test_the_rate_rises_straight_and_falls_by_half_a_cosine(samples, rate):
    assert learning_rate(CONFIG, samples, max_samples=1100) == pytest.approx(rate)


def test_without_warm_up_the_rate_starts_at_its_maximum():
    assert learning_rate(OptimizerConfig(learning_rate=2.0, warmup_samples=0), 0, max_samples=10) == 2.0


def test_a_run_shorter_than_its_warm_up_never_leaves_it():
    assert learning_rate(CONFIG, 40, max_samples=50) == pytest.approx(0.8)


def test_every_parameter_of_the_unet_lies_in_a_block_or_in_the_rest():
    blocks = {block_of(f"unet.{name}") for name, _ in build_unet().named_parameters()}
    assert blocks == {*(f"{way}_{i}" for way in ("down", "up") for i in range(4)), "mid", "rest"}


PARAMETERS = {name: torch.nn.Parameter(torch.ones(2)) for name in ("down_blocks.1.a", "mid_block.b", "conv_in.c")}


def test_a_block_learns_at_its_own_rate():
    optimizer = build_optimizer(OptimizerConfig(block_rates={"mid": 0.5, "rest": 0.0}), PARAMETERS)
    set_learning_rate(optimizer, 0.1)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: rates[id(parameter)] for name, parameter in PARAMETERS.items()} == {
        "down_blocks.1.a": 0.1,
        "mid_block.b": 0.05,
        "conv_in.c": 0.0,
    }


def test_without_rates_of_their_own_all_blocks_are_one_group():
    assert len(build_optimizer(OptimizerConfig(), PARAMETERS).param_groups) == 1


def test_the_rate_of_an_unknown_block_is_refused():
    with pytest.raises(Refused, match=r"block_rates\.down_2: no such block - did you mean down_1"):
        build_optimizer(OptimizerConfig(block_rates={"down_2": 0.5}), PARAMETERS)


def test_eight_bits_without_their_library_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Refused, match=r"adamw_8bit: bitsandbytes .* pip install 'sollune\[8bit\]'"):
        build_optimizer(OptimizerConfig(kind="adamw_8bit"), PARAMETERS)


def test_eight_bits_resume_to_the_same_bits():
    pytest.importorskip("bitsandbytes")
    gradients = torch.randn(6, 80, 80, generator=torch.Generator().manual_seed(0))
    config = OptimizerConfig(kind="adamw_8bit", block_rates={"mid": 0.5})

    def start(weight):
        parameter = torch.nn.Parameter(weight.clone())
        return parameter, build_optimizer(config, {"mid_block.weight": parameter})

    def steps(parameter, optimizer, some):
        for gradient in some:
            parameter.grad = gradient
            set_learning_rate(optimizer, 0.01)
            optimizer.step()

    whole, optimizer = start(torch.ones(80, 80))
    steps(whole, optimizer, gradients[:3])
    second, resumed = start(whole.detach())
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, gradients[3:])
    steps(second, resumed, gradients[3:])
    assert torch.equal(whole, second)
    assert not torch.equal(whole, torch.ones(80, 80))


def test_eight_bits_and_balanced_blocks_are_refused_together():
    with pytest.raises(ValueError, match="block_rates balanced"):
        OptimizerConfig(kind="adamw_8bit", block_rates="balanced")


def test_where_torch_has_no_fused_form_the_ordinary_one_is_taken():
    elsewhere = {"mid_block.weight": torch.nn.Parameter(torch.ones(2, device="meta"))}
    assert not build_optimizer(OptimizerConfig(), elsewhere).param_groups[0]["fused"]
    assert build_optimizer(OptimizerConfig(), PARAMETERS).param_groups[0]["fused"]
