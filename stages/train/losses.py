"""Errors of a velocity, of its guidance and of pooled features, and the losses of a batch and of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from configs.values import PictureSize
from stages.flow.path import per_sample
from stages.flow.timesteps import bin_of_time

DEVIATION_FLOOR = 0.01
NORM_FLOOR = 1e-12
"""Of the squared norm of a pooled feature, which is far above that unless all channels are 0."""


def velocity_error(v: Float[Tensor, "b ..."], v_star: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Mean square over everything but the batch."""
    return (v.float() - v_star.float()).square().flatten(1).mean(dim=1)


def data_velocity(
    x_s: Float[Tensor, "b c h w"], s: Float[Tensor, " b"], x0: Float[Tensor, "b c h w"] | None
) -> Float[Tensor, "b c h w"]:
    """(x_s - x0) / s: the velocity of the straight line from the cached picture through the state.

    For a forward-noised state it is eps - x0, whose mean given the state is a velocity of the pictures' distribution;
    for a state of the teacher's trajectory the mean velocity on the way to the end of that. Raises `ValueError` where
    the pictures were not read.
    """
    if x0 is None:
        raise ValueError("the data target needs batches that were read with x0")
    return (x_s.float() - x0.float()) / per_sample(s, x_s)


def guidance_error(
    e_cond: Float[Tensor, "b ..."], e_uncond: Float[Tensor, "b ..."], w: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Mean square of the guided velocity's error, over what independent branch errors of size 1 would give.

    mean |e_u + w (e_c - e_u)|^2 / (w^2 + (w - 1)^2)   (mathematics.md section 5)
    """
    e_cond, e_uncond = e_cond.float(), e_uncond.float()
    guided = e_uncond + per_sample(w, e_cond) * (e_cond - e_uncond)
    return guided.square().flatten(1).mean(dim=1) / (w**2 + (w - 1) ** 2)


@dataclass(frozen=True)
class FeatureScale:
    """Standard deviation of each pooled channel of each block, in each of several equal bins of s."""

    deviations: Mapping[str, Float[Tensor, "bins n"]]

    def at(self, s: Float[Tensor, " b"]) -> Mapping[str, Float[Tensor, "b n"]]:
        """The deviations at these times."""
        return {block: deviation[bin_of_time(s, len(deviation))] for block, deviation in self.deviations.items()}

    def to(self, device: torch.device) -> "FeatureScale":
        """The same deviations on another device."""
        return FeatureScale({block: deviation.to(device) for block, deviation in self.deviations.items()})


def floor_deviations(per_bin: Float[Tensor, "bins n"], overall: Float[Tensor, " n"]) -> Float[Tensor, "bins n"]:
    """Deviations of the bins, at least a hundredth of the block's mean, lest a nearly constant channel outweigh all."""
    return per_bin.clamp_min(DEVIATION_FLOOR * float(overall.mean()))


def block_errors(
    features: Mapping[str, Float[Tensor, "b n"]],
    targets: Mapping[str, Float[Tensor, "b n"]],
    deviations: Mapping[str, Float[Tensor, "#b n"]],
) -> Float[Tensor, "n_blocks b"]:
    """Mean square of the standardised features' difference, for each block of `targets`, in its order.

    Standardising subtracts the same mean on both sides, so only the deviations are needed.
    """
    return torch.stack(
        [((features[b].float() - targets[b].float()) / deviations[b]).square().mean(dim=1) for b in targets]
    )


def cosine_errors(
    features: Mapping[str, Float[Tensor, "b n"]], targets: Mapping[str, Float[Tensor, "b n"]]
) -> Float[Tensor, "n_blocks b"]:
    """1 - cos of the plain pooled features, for each block of `targets`: the original experiment's form."""
    return torch.stack([1 - F.cosine_similarity(features[b].float(), targets[b].float(), dim=1) for b in targets])


def teacher_norm_errors(
    features: Mapping[str, Float[Tensor, "b n"]], targets: Mapping[str, Float[Tensor, "b n"]]
) -> Float[Tensor, "n_blocks b"]:
    """|f_s - f_t|^2 / |f_t|^2 of the pooled features, for each block of `targets` (LAPTOP-Diff, arXiv:2404.11098)."""
    return torch.stack(
        [
            (features[b].float() - target.float()).square().sum(dim=1)
            / target.float().square().sum(dim=1).clamp_min(NORM_FLOOR)
            for b, target in targets.items()
        ]
    )


@dataclass(frozen=True)
class Losses:
    """The loss of one batch: only `total` and `rest` carry gradients; the other parts are for the journal."""

    total: Float[Tensor, ""]
    rest: Float[Tensor, ""]
    """`total` without the block term"""
    flow: Float[Tensor, ""]
    guidance: Float[Tensor, ""]
    blocks: Float[Tensor, " n_blocks"]
    """error of each block, importance-weighted"""
    flow_errors: Float[Tensor, " b"]
    """unweighted, as are the two below, which are 0 for rows without teacher predictions"""
    guidance_errors: Float[Tensor, " b"]
    block_errors: Float[Tensor, "n_blocks b"]
    importance_weight: Float[Tensor, " b"]

    @classmethod
    def merge_chunks(cls, chunks: Sequence["Losses"]) -> "Losses":
        """The losses of a batch from those of its equal micro-batches; without gradients."""
        means = ("total", "rest", "flow", "guidance", "blocks")
        rows = ("flow_errors", "guidance_errors", "block_errors", "importance_weight")
        mean = {name: torch.stack([getattr(chunk, name).detach() for chunk in chunks]).mean(dim=0) for name in means}
        return cls(**mean, **{name: torch.cat([getattr(chunk, name) for chunk in chunks], dim=-1) for name in rows})


@dataclass(frozen=True)
class StepResult:
    """What the journal records of one step."""

    losses: Losses
    lambdas: Float[Tensor, " n_blocks"]
    block_weight: float
    s: Float[Tensor, " b"]
    grad_norm: Float[Tensor, ""]
    learning_rate: float
    data_wait_seconds: float
    group: Int[Tensor, " b"] | None = None
    """index of each sample's group in the journal"""
    size: PictureSize | None = None
    """picture size of all its samples"""
