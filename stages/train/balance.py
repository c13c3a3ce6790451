"""Rates of the blocks by which each moves by the same share of its weights."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stages.train.optim import OptimizerConfig

BALANCED_EVERY_SAMPLES = 1280
"""A balance costs about five of the optimizer's own steps."""
LEAST, MOST = 0.1, 10.0


def balance(config: OptimizerConfig, optimizer: torch.optim.Optimizer, before: int, after: int) -> None:
    """Set the shares of `balanced` blocks anew where that is due while the samples seen rise from `before` to `after`.

    Called after the step. The shares lie in the optimizer's groups, and so in every checkpoint.
    """
    if config.block_rates == "balanced" and after // BALANCED_EVERY_SAMPLES > before // BALANCED_EVERY_SAMPLES:
        for group, share in zip(optimizer.param_groups, shares(optimizer), strict=True):
            group["share"] = share


@torch.no_grad()
def shares(optimizer: torch.optim.Optimizer) -> list[float]:
    """For each group, the share of the learning rate at which |dw| / |w| is that of all weights together.

    share_b = (|w_b| / |u_b|) (|u| / |w|), within LEAST and MOST, where u is the step at rate 1: LAMB's trust ratio
    (You et al. 2020, algorithm 2) of a block instead of a tensor, times one factor for all blocks that keeps |dw| what
    it was, so that the learning rate keeps its meaning. 1 where a block has no weights or does not move, as there.
    """
    w2, u2 = torch.stack([_squares(optimizer, group) for group in optimizer.param_groups]).unbind(dim=1)
    found = (w2 / u2 * (u2.sum() / w2.sum())).sqrt().clamp(LEAST, MOST)
    return torch.where((w2 > 0) & (u2 > 0), found, 1.0).tolist()


def _squares(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Float[Tensor, "2"]:
    """|w|^2 and |u|^2 of one group, in double precision."""
    norms = [torch.stack([w.norm(), u.norm()]).double() for w, u in _moved(optimizer, group)]
    return torch.stack(norms).square().sum(dim=0)


def _moved(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of a group and AdamW's step at rate 1, from its moments: m / (sqrt(v) + eps) + decay w."""
    one, two = group["betas"]
    for weight in group["params"]:
        state = optimizer.state[weight]
        if state:
            m = state["exp_avg"] / (1 - one ** state["step"])
            v = state["exp_avg_sq"] / (1 - two ** state["step"])
            yield weight, m / (v.sqrt() + group["eps"]) + group["weight_decay"] * weight
        else:
            yield weight, torch.zeros_like(weight)
