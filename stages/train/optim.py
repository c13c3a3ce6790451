"""The optimizer, its learning rate (a function of the samples seen alone), and how far it moves each block."""

import importlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.values import Strict
from stages.system.refusal import Refused, did_you_mean
from stages.train.optimizers.muon import MuonWithAdamW
from stages.train.optimizers.partition import SINGLE_PROCESS, Partition, Partitioned, PartitionedAdamW, ProcessGroup

BLOCK_PATTERN = re.compile(r"\b(?:(down|up)_blocks\.(\d+)|(mid)_block)\.")
REST_BLOCK = "rest"
"""The parameters outside the blocks: the first and last convolution and the time embedding."""
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch has a fused AdamW."""


class OptimizerConfig(Strict):
    """AdamW or Muon with warm-up, a cosine and gradient clipping."""

    kind: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw keeps two moments of four bytes a weight, adamw_8bit two of one byte (extra 8bit); muon one "
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
        description=f"factor on the learning rate of single blocks (or of the {REST_BLOCK}), 1 for a block not named; "
        "balanced: factors that move every block by the same share of its weights",
    )
    final_share: float = Field(0.0, ge=0, le=1, description="share of learning_rate left at the end of the cosine")

    @model_validator(mode="after")
    def _check_balanced_kind(self) -> "OptimizerConfig":
        if self.block_rates == "balanced" and self.kind != "adamw":
            raise ValueError(f"block_rates balanced reads AdamW's own moments: take kind adamw instead of {self.kind}")
        return self


def learning_rate(config: OptimizerConfig, samples: float, max_samples: int) -> float:
    """The rate after `samples` of `max_samples`: a linear rise, then half a cosine down to the final share."""
    if samples < config.warmup_samples:
        return config.learning_rate * samples / config.warmup_samples
    progress = min(1.0, (samples - config.warmup_samples) / max(1, max_samples - config.warmup_samples))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_share + (1 - config.final_share) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step, in each group times its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def block_of(parameter: str) -> str:
    """The block of a parameter with this name: down_0 ... up_3, mid, or the rest."""
    match = BLOCK_PATTERN.search(parameter)
    if not match:
        return REST_BLOCK
    return match[3] or f"{match[1]}_{match[2]}"


def uses_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: the weights of hidden layers; no biases, not the first and last layer."""
    return parameter.ndim > 1 and block_of(name) != REST_BLOCK


def build_optimizer(
    config: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    process_group: ProcessGroup = SINGLE_PROCESS,
    shard_moments: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of these parameters; one group for each rate, or for each block when they are balanced.

    The processes of the group hold the same parameters and gradients, and share Muon's work and its momenta; with
    `shard_moments` AdamW's too.

    Raises `Refused` for the rate of a block without parameters, and for 8 bits without bitsandbytes.
    """
    known = sorted({block_of(name) for name in parameters})
    for block in config.block_rates if config.block_rates != "balanced" else ():
        if block not in known:
            raise Refused(f"optimizer.block_rates.{block}: no such block - {did_you_mean(block, known)}")
    options: dict[str, Any] = {"lr": config.learning_rate} | config.model_dump(include={"betas", "eps", "weight_decay"})
    if config.kind == "adamw_8bit":
        return _adamw_8bit(_groups(config, parameters), options)
    # The fused form makes one pass over memory, on a CPU too, and no copies.
    options["fused"] = all(parameter.device.type in FUSED_DEVICES for parameter in parameters.values())
    shards = shard_moments and process_group.world > 1
    if config.kind == "muon":
        matrices = {name: p for name, p in parameters.items() if uses_muon(name, p)}
        rest = {name: p for name, p in parameters.items() if name not in matrices}
        return MuonWithAdamW(_groups(config, matrices), _groups(config, rest), process_group, shards, **options)
    if shards:
        return PartitionedAdamW(_groups(config, parameters), Partition(process_group), **options)
    return torch.optim.AdamW(_groups(config, parameters), **options)


def _groups(config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters with one rate, and its share of the learning rate; one group for each block when balanced."""
    groups: dict[str | float, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        block = block_of(name)
        share = 1.0 if config.block_rates == "balanced" else config.block_rates.get(block, 1.0)
        key = block if config.block_rates == "balanced" else share
        groups.setdefault(key, {"params": [], "share": share})["params"].append(parameter)
    return list(groups.values())


def _adamw_8bit(groups: list[dict[str, Any]], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW with moments quantised in blocks of 256 (Dettmers et al. 2022); not for tensors below 4096 elements."""
    try:
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise Refused(
            f"optimizer.kind adamw_8bit: bitsandbytes cannot be imported ({error}) - "
            "pip install 'sollune[8bit]', or take kind adamw"
        ) from error
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
    return optimizer


REBALANCE_EVERY_SAMPLES = 1280
"""Each time costs about five of the optimizer's own steps."""
MIN_SHARE, MAX_SHARE = 0.1, 10.0


def rebalance(config: OptimizerConfig, optimizer: torch.optim.Optimizer, before: int, after: int) -> None:
    """After a step from `before` to `after` samples: update the shares of `balanced` blocks, if due.

    The shares are in the optimizer's groups, and so in every checkpoint.
    """
    if config.block_rates == "balanced" and after // REBALANCE_EVERY_SAMPLES > before // REBALANCE_EVERY_SAMPLES:
        for group, share in zip(optimizer.param_groups, balanced_shares(optimizer), strict=True):
            group["share"] = share


@torch.no_grad()
def balanced_shares(optimizer: torch.optim.Optimizer) -> list[float]:
    """For each group, the share of the learning rate at which |dw| / |w| is that of all weights together.

    share_b = (|w_b| / |u_b|) (|u| / |w|), within MIN_SHARE and MAX_SHARE, where u is the step at rate 1: LAMB's trust
    ratio (You et al. 2020, algorithm 2) of a block instead of a tensor, times one factor for all blocks that keeps |dw|
    unchanged, so that the learning rate keeps its meaning. 1 where a block is zero or does not move, as there.
    """
    norms = [_norms(optimizer, group) for group in optimizer.param_groups]
    if isinstance(optimizer, Partitioned):  # each weight's norms, and zeros from the processes that do not own it
        norms = optimizer.partition.group.all_reduce_sum(norms)
    w2, u2 = torch.stack([pairs.square().sum(dim=0) for pairs in norms]).unbind(dim=1)
    shares = (w2 / u2 * (u2.sum() / w2.sum())).sqrt().clamp(MIN_SHARE, MAX_SHARE)
    return torch.where((w2 > 0) & (u2 > 0), shares, 1.0).tolist()


def _norms(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Float[Tensor, "n 2"]:
    """|w| and |u| of each weight of a group, in double precision; 0 where another process has the moments."""
    return torch.stack([torch.stack([w.norm(), u.norm()]).double() for w, u in _weights_and_updates(optimizer, group)])


def _weights_and_updates(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight of a group and AdamW's step at rate 1, from its moments: m / (sqrt(v) + eps) + decay w."""
    beta1, beta2 = group["betas"]
    for weight in group["params"]:
        state = optimizer.state.get(weight)
        if isinstance(optimizer, Partitioned) and not optimizer.partition.owns(weight):
            yield torch.zeros_like(weight), torch.zeros_like(weight)
        elif state:
            m = state["exp_avg"] / (1 - beta1 ** state["step"])
            v = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
            yield weight, m / (v.sqrt() + group["eps"]) + group["weight_decay"] * weight
        else:
            yield weight, torch.zeros_like(weight)


MAX_SAMPLED_WEIGHTS = 4096


class UpdateRatios:
    """|dw| / |w| by block, between `record_weights` and `ratios`.

    Estimated from about `MAX_SAMPLED_WEIGHTS` evenly spaced weights of each parameter, so that no copy of all weights
    is held; it works with any optimizer.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._recorded: dict[str, Tensor] = {}

    def record_weights(self) -> None:
        """Copy the sampled weights; called just before a step."""
        self._recorded = {name: _sample_weights(parameter).clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """The ratios since `record_weights`, whose copy is dropped; empty without one."""
        if not self._recorded:
            return {}
        before = list(self._recorded.values())
        moved = torch._foreach_sub([_sample_weights(self._parameters[name]) for name in self._recorded], before)
        norms = torch.stack([torch.stack(torch._foreach_norm(sampled)) for sampled in (moved, before)])
        squares = norms.double().square().cpu()
        blocks: dict[str, Tensor] = {}
        for column, (name, sampled) in enumerate(self._recorded.items()):
            scaled = squares[:, column] * (self._parameters[name].numel() / sampled.numel())
            blocks[block_of(name)] = blocks.get(block_of(name), 0.0) + scaled
        self._recorded = {}
        return {block: float((moved / whole).sqrt()) for block, (moved, whole) in sorted(blocks.items())}


def _sample_weights(parameter: nn.Parameter) -> Tensor:
    """Evenly spaced weights in the order of memory, whatever the memory format."""
    stride = -(-parameter.numel() // MAX_SAMPLED_WEIGHTS)
    while math.gcd(stride, parameter.numel()) > 1 and stride > 1:
        stride += 1  # a stride that divides a dimension would sample one place of every kernel
    count = -(-parameter.numel() // stride)
    return parameter.detach().as_strided((count,), (stride,), parameter.storage_offset())
