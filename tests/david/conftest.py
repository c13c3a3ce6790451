"""A world whose bins and content are known: features that follow a curve in time, shifted by content."""

from collections.abc import Callable

import pytest
import torch
from jaxtyping import Int
from torch import Tensor

from stages.david.block_model import BlockModel, FitConfig
from stages.david.fit import fit_block
from stages.david.patterns import BlockStates, PatternSpace
from stages.david.trial import tune
from stages.flow.timesteps import bin_of_step
from stages.system.device import one_thread

CONTENTS, WIDTH = 4, 12
CONFIG = FitConfig(bins=20, patterns=CONTENTS, dimensions=16, steps=250, batch_size=128, learning_rate=2e-2)


def world(prompts: int, seed: int) -> tuple[BlockStates, Int[Tensor, " m"]]:
    """Four states of each prompt, and the content of each."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.arange(prompts).repeat_interleave(4)
    content = torch.randint(CONTENTS, (prompts,), generator=generator)[key]
    k = torch.randint(1000, (len(key),), generator=generator)
    s = k / 1000
    shape = torch.Generator().manual_seed(99)  # the same world for every seed
    of_time, of_content = torch.randn(3, WIDTH, generator=shape), 1.5 * torch.randn(CONTENTS, WIDTH, generator=shape)
    path = torch.stack([s, torch.sin(3 * s), torch.cos(3 * s)], dim=1)
    noise = 0.03 * torch.randn(len(k), WIDTH, generator=generator)
    return BlockStates(
        4 * path @ of_time + of_content[content] + noise, s, bin_of_step(k, CONFIG.bins, 1000), key
    ), content


@pytest.fixture(scope="session")
def make_world() -> Callable[[int, int], tuple[BlockStates, Int[Tensor, " m"]]]:
    return world


@pytest.fixture(scope="session")
def config() -> FitConfig:
    return CONFIG


@pytest.fixture(scope="session")
def fitted() -> tuple[BlockModel, PatternSpace]:
    """A block model fitted to that world, and its patterns."""
    with one_thread():
        model, space = fit_block(world(300, 0)[0], CONFIG)
        tune(model, world(100, 1)[0], space, 0)
    return model, space


@pytest.fixture(scope="session")
def held_out() -> BlockStates:
    """States used neither to train nor to tune."""
    return world(150, 2)[0]
