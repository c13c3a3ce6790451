import pytest
import torch
from torch import nn

from stages.train.optim import (
    MAX_SHARE,
    REBALANCE_EVERY_SAMPLES,
    OptimizerConfig,
    balanced_shares,
    build_optimizer,
    rebalance,
    set_learning_rate,
)

CONFIG = OptimizerConfig(block_rates="balanced", weight_decay=0.1)
RATE = 1e-6
SCALES = {"down_blocks.0.a": 3.0, "down_blocks.0.b": 0.5, "mid_block.c": 1.0, "conv_in.d": 0.7}


def parameters():
    generator = torch.Generator().manual_seed(0)
    made = {name: scale * torch.randn(4, 5, generator=generator).double() for name, scale in SCALES.items()}
    return {name: nn.Parameter(weight) for name, weight in made.items()}


def step(optimizer, seed):
    """One step on gradients of any size; the norms of each group's weights and of their movement."""
    generator = torch.Generator().manual_seed(seed)
    groups = [group["params"] for group in optimizer.param_groups]
    before = [torch.cat([w.detach().flatten() for w in group]) for group in groups]
    for parameter in (w for group in groups for w in group):
        parameter.grad = (1 + torch.randn(parameter.shape, generator=generator)).double()
    set_learning_rate(optimizer, RATE)
    optimizer.step()
    after = [torch.cat([w.detach().flatten() for w in group]) for group in groups]
    weights = torch.stack([w.norm() for w in before])
    return weights, torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)])


def test_balanced_blocks_move_by_one_share_of_their_weights_and_together_as_far_as_before():
    optimizer = build_optimizer(CONFIG, parameters())
    for seed in range(4):
        weights, moved = step(optimizer, seed)
    ratios = moved / weights
    assert ratios.max() > 1.5 * ratios.min()
    balanced = torch.tensor(balanced_shares(optimizer)) * moved
    together = (moved.norm() / weights.norm()).expand(3)
    torch.testing.assert_close(balanced / weights, together, rtol=1e-4, atol=0)
    torch.testing.assert_close(balanced.norm(), moved.norm(), rtol=1e-4, atol=0)


def test_a_block_without_weights_keeps_its_rate_and_no_rate_leaves_its_bounds():
    named = parameters()
    named["mid_block.c"].data.zero_()
    named["down_blocks.0.a"].data.mul_(1e6)
    optimizer = build_optimizer(CONFIG, named)
    assert balanced_shares(optimizer) == [1.0, 1.0, 1.0]
    step(optimizer, 0)
    named["mid_block.c"].data.zero_()
    down, mid, rest = balanced_shares(optimizer)
    assert mid == 1.0
    assert down <= MAX_SHARE
    assert rest == pytest.approx(0.1)


def test_blocks_are_balanced_at_the_same_samples_whatever_the_batch_size():
    for size in (128, 320):
        optimizer = build_optimizer(CONFIG, parameters())
        step(optimizer, 0)
        changed_at = None
        for before in range(0, REBALANCE_EVERY_SAMPLES, size):
            rebalance(CONFIG, optimizer, before, before + size)
            if changed_at is None and any(group["share"] != 1.0 for group in optimizer.param_groups):
                changed_at = before + size
        assert changed_at == REBALANCE_EVERY_SAMPLES


def test_a_table_of_rates_is_left_alone():
    config = OptimizerConfig(block_rates={"mid": 0.5})
    optimizer = build_optimizer(config, parameters())
    step(optimizer, 0)
    rebalance(config, optimizer, 0, REBALANCE_EVERY_SAMPLES)
    assert sorted(group["share"] for group in optimizer.param_groups) == [0.5, 1.0]


def test_the_balance_survives_in_the_optimizers_own_state():
    optimizer, resumed = (build_optimizer(CONFIG, parameters()) for _ in range(2))
    step(optimizer, 0)
    rebalance(CONFIG, optimizer, 0, REBALANCE_EVERY_SAMPLES)
    resumed.load_state_dict(optimizer.state_dict())
    shares = [group["share"] for group in resumed.param_groups]
    assert shares == balanced_shares(optimizer)
    assert shares != [1.0] * 3
