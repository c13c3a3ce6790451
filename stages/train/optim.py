"""The optimizer and its learning rate, which is a function of the samples seen and of nothing else."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from configs.refusal import Refused, did_you_mean
from configs.strict import Strict

BLOCK = re.compile(r"\b(?:(down|up)_blocks\.(\d+)|(mid)_block)\.")
REST = "rest"
"""What lies in no block: the first and last convolution and the time embedding."""


class OptimizerConfig(Strict):
    """AdamW with warm-up, a cosine and gradient clipping."""

    learning_rate: float = Field(1e-4, gt=0, description="highest learning rate, reached after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of AdamW's two moments, per step")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay, times the learning rate, per step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    warmup_samples: int = Field(3200, ge=0, description="samples over which the learning rate rises from 0")
    block_rates: Mapping[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description=f"learning rate of single blocks (or of the {REST}) over the others'; 1 for a block not named"
    )
    final_share: float = Field(0.0, ge=0, le=1, description="share of learning_rate left at the end of the cosine")


def learning_rate(config: OptimizerConfig, samples: float, max_samples: int) -> float:
    """The rate after `samples` of `max_samples`: a straight rise, then half a cosine down to the final share."""
    if samples < config.warmup_samples:
        return config.learning_rate * samples / config.warmup_samples
    left = max(1, max_samples - config.warmup_samples)
    way = min(1.0, (samples - config.warmup_samples) / left)
    falling = 0.5 * (1 + math.cos(math.pi * way))
    return config.learning_rate * (config.final_share + (1 - config.final_share) * falling)


def block_of(parameter: str) -> str:
    """The block in which a parameter of this name lies: down_0 ... up_3, mid, or the rest."""
    found = BLOCK.search(parameter)
    if not found:
        return REST
    return found[3] or f"{found[1]}_{found[2]}"


def build_optimizer(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW in its fused form, which is one pass over memory on a CPU as well; one group for each rate.

    Raises `Refused` for the rate of a block that no parameter lies in.
    """
    blocks = {name: block_of(name) for name in parameters}
    for block in config.block_rates:
        if block not in blocks.values():
            known = sorted(set(blocks.values()))
            raise Refused(f"optimizer.block_rates.{block}: no such block - {did_you_mean(block, known)}")
    shares: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        shares.setdefault(config.block_rates.get(blocks[name], 1.0), []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": listed, "share": share} for share, listed in shares.items()]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step go at this rate, in each group times its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
