"""Errors of a velocity, of its guidance and of pooled features: plain functions of tensors, reduced in fp32."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stages.flow.path import per_sample
from stages.flow.timesteps import bin_of_time

DEVIATION_FLOOR = 0.01


def velocity_error(v: Float[Tensor, "b ..."], v_star: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Mean square over everything but the batch."""
    return (v.float() - v_star.float()).square().flatten(1).mean(dim=1)


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
