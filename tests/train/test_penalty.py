"""Laws of the block term's pull."""

import pytest
import torch
from torch import nn

from stages.train.objective import MEASURE_EVERY_SAMPLES, BlockTermWeight, Losses, ObjectiveConfig

PARAMETER = nn.Parameter(torch.tensor([3.0, 4.0]))
NOTHING = torch.zeros(0)


def losses(weight: float, pull: float) -> Losses:
    """The rest pulls with a gradient of norm 2, the unweighted block term with one of norm `pull`."""
    rest, blocks = 2 * PARAMETER[0], pull * PARAMETER[1]
    return Losses(rest + weight * blocks, rest, *[NOTHING] * 7)


def looked(penalty: BlockTermWeight, pull: float, samples: int, progress: float = 0.0) -> BlockTermWeight:
    penalty.update(penalty.measure(losses(penalty.weight(progress), pull), progress, samples, [PARAMETER]), samples)
    return penalty


def test_the_block_term_is_held_at_its_share_of_the_pull() -> None:
    penalty = looked(BlockTermWeight(ObjectiveConfig(block_share=0.2)), pull=7.0, samples=0)
    assert penalty.weight(0.0) * 7.0 / 2.0 == pytest.approx(0.2 / 0.8)


def test_the_share_is_that_before_it_sinks() -> None:
    config = ObjectiveConfig(block_share=0.2, blocks_until=0.6)
    early, late = (looked(BlockTermWeight(config), 7.0, 0, progress) for progress in (0.0, 0.3))
    assert late.factor == pytest.approx(early.factor)
    assert late.weight(0.3) == pytest.approx(early.weight(0.0) / 2)


def test_a_single_batch_moves_it_half() -> None:
    penalty = looked(BlockTermWeight(ObjectiveConfig(block_share=0.2)), pull=7.0, samples=0)
    first = penalty.factor
    looked(penalty, pull=700.0, samples=MEASURE_EVERY_SAMPLES - 1)
    assert penalty.factor == first
    looked(penalty, pull=700.0, samples=MEASURE_EVERY_SAMPLES)
    assert penalty.factor == pytest.approx(first / 10)


def test_without_a_share_nothing_is_measured() -> None:
    penalty = looked(BlockTermWeight(ObjectiveConfig(block_weight=0.05)), pull=7.0, samples=0)
    assert penalty.factor == 1
    assert penalty.weight(0.0) == 0.05


def test_it_goes_on_from_what_it_remembers() -> None:
    config = ObjectiveConfig(block_share=0.2)
    one = looked(BlockTermWeight(config), 7.0, 0)
    two = BlockTermWeight(config)
    two.load_state_dict(one.state_dict())
    assert looked(two, 70.0, 2000).factor == looked(one, 70.0, 2000).factor != 1
