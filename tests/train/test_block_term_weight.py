"""The weight of the block term, held at a share of the gradient norm."""

import pytest
import torch
from torch import nn

from stages.train.losses import Losses
from stages.train.objective import MEASURE_EVERY_SAMPLES, BlockTermWeight, ObjectiveConfig

PARAMETER = nn.Parameter(torch.tensor([3.0, 4.0]))
NOTHING = torch.zeros(0)


def losses(weight: float, norm: float) -> Losses:
    """The rest has a gradient of norm 2, the unweighted block term one of norm `norm`."""
    rest, blocks = 2 * PARAMETER[0], norm * PARAMETER[1]
    return Losses(rest + weight * blocks, rest, *[NOTHING] * 7)


def measured(block_term: BlockTermWeight, norm: float, samples: int, progress: float = 0.0) -> BlockTermWeight:
    block_term.update(
        block_term.measure(losses(block_term.weight(progress), norm), progress, samples, [PARAMETER]), samples
    )
    return block_term


def test_the_block_term_is_held_at_its_share_of_the_gradient() -> None:
    block_term = measured(BlockTermWeight(ObjectiveConfig(block_share=0.2)), norm=7.0, samples=0)
    assert block_term.weight(0.0) * 7.0 / 2.0 == pytest.approx(0.2 / 0.8)


def test_the_share_is_that_before_annealing() -> None:
    config = ObjectiveConfig(block_share=0.2, blocks_until=0.6)
    early, late = (measured(BlockTermWeight(config), 7.0, 0, progress) for progress in (0.0, 0.3))
    assert late.factor == pytest.approx(early.factor)
    assert late.weight(0.3) == pytest.approx(early.weight(0.0) / 2)


def test_a_single_batch_changes_it_by_half() -> None:
    block_term = measured(BlockTermWeight(ObjectiveConfig(block_share=0.2)), norm=7.0, samples=0)
    first = block_term.factor
    measured(block_term, norm=700.0, samples=MEASURE_EVERY_SAMPLES - 1)
    assert block_term.factor == first
    measured(block_term, norm=700.0, samples=MEASURE_EVERY_SAMPLES)
    assert block_term.factor == pytest.approx(first / 10)


def test_without_a_share_nothing_is_measured() -> None:
    block_term = measured(BlockTermWeight(ObjectiveConfig(block_weight=0.05)), norm=7.0, samples=0)
    assert block_term.factor == 1
    assert block_term.weight(0.0) == 0.05


def test_it_resumes_from_its_state() -> None:
    config = ObjectiveConfig(block_share=0.2)
    one = measured(BlockTermWeight(config), 7.0, 0)
    two = BlockTermWeight(config)
    two.load_state_dict(one.state_dict())
    assert measured(two, 70.0, 2000).factor == measured(one, 70.0, 2000).factor != 1
