"""The optimizer and its learning rate, which is a function of the samples seen and of nothing else."""

import importlib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from configs.refusal import Refused, did_you_mean
from configs.strict import Strict
from stages.train.muon import ALONE, MuonWithAdamW, Processes

BLOCK = re.compile(r"\b(?:(down|up)_blocks\.(\d+)|(mid)_block)\.")
REST = "rest"
"""What lies in no block: the first and last convolution and the time embedding."""
FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch has AdamW in its fused form."""


class OptimizerConfig(Strict):
    """AdamW or Muon with warm-up, a cosine and gradient clipping."""

    kind: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw keeps two numbers of four bytes a weight, adamw_8bit two of one byte (extra 8bit); muon one "
        "for the matrices of the blocks, and is AdamW elsewhere",
    )
    learning_rate: float = Field(1e-4, gt=0, description="highest learning rate, reached after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of AdamW's two moments, per step")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay, times the learning rate, per step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    warmup_samples: int = Field(3200, ge=0, description="samples over which the learning rate rises from 0")
    block_rates: Mapping[str, Annotated[float, Field(ge=0)]] | Literal["balanced"] = Field(
        {},
        description=f"learning rate of single blocks (or of the {REST}) over the others', 1 for a block not named; "
        "balanced: whatever moves every block by the same share of its weights",
    )
    final_share: float = Field(0.0, ge=0, le=1, description="share of learning_rate left at the end of the cosine")

    @model_validator(mode="after")
    def _moments_can_be_read(self) -> "OptimizerConfig":
        if self.block_rates == "balanced" and self.kind != "adamw":
            raise ValueError(f"block_rates balanced reads AdamW's own moments: take kind adamw instead of {self.kind}")
        return self


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


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is meant for a parameter: for hidden layers, so neither biases nor the first and last one."""
    return parameter.ndim > 1 and block_of(name) != REST


def build_optimizer(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], processes: Processes = ALONE
) -> torch.optim.Optimizer:
    """The optimizer of these parameters; one group for each rate, or for each block when they are balanced.

    Muon's work is shared among the processes that hold the same parameters and gradients.

    Raises `Refused` for the rate of a block that no parameter lies in, and for 8 bits without their library.
    """
    _refuse_unknown(config, parameters)
    options: dict[str, Any] = {"lr": config.learning_rate} | config.model_dump(include={"betas", "eps", "weight_decay"})
    if config.kind == "adamw_8bit":
        return _eight_bit(_groups(config, parameters), options)
    # The fused form is one pass over memory on a CPU as well, and makes no copies.
    options["fused"] = all(parameter.device.type in FUSED for parameter in parameters.values())
    if config.kind == "muon":
        matrices = {name: p for name, p in parameters.items() if is_matrix(name, p)}
        rest = {name: p for name, p in parameters.items() if name not in matrices}
        return MuonWithAdamW(_groups(config, matrices), _groups(config, rest), processes, **options)
    return torch.optim.AdamW(_groups(config, parameters), **options)


def _refuse_unknown(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> None:
    known = sorted({block_of(name) for name in parameters})
    for block in config.block_rates if config.block_rates != "balanced" else ():
        if block not in known:
            raise Refused(f"optimizer.block_rates.{block}: no such block - {did_you_mean(block, known)}")


def _groups(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters that go at one rate, and its share of the learning rate."""
    blocks = {name: block_of(name) for name in parameters}
    shares: dict[str | float, list[nn.Parameter]] = {}
    if config.block_rates == "balanced":
        for name, parameter in parameters.items():
            shares.setdefault(blocks[name], []).append(parameter)
        return [{"params": listed, "share": 1.0} for listed in shares.values()]
    for name, parameter in parameters.items():
        shares.setdefault(config.block_rates.get(blocks[name], 1.0), []).append(parameter)
    return [{"params": listed, "share": share} for share, listed in shares.items()]


def _eight_bit(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW with moments quantised in blocks of 256 (Dettmers et al. 2022); tensors below 4096 numbers stay as ever."""
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise Refused(
            f"optimizer.kind adamw_8bit: bitsandbytes cannot be imported ({error}) - "
            "pip install 'sollune[8bit]', or take kind adamw"
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step go at this rate, in each group times its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
