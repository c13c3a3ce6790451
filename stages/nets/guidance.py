"""The guidance scale as an input of the network: diffusers' own `time_cond_proj_dim` (mathematics, section 7).

The embedding e(w) of stock pipelines has columns sin and cos of 1000 f_i (w - 1), with f_i from 1 down to 1e-4. A
projection of it is added to the sinusoids of the time, before the first layer of the time embedding.
"""

import math

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Bool, Float
from torch import Tensor

from stages.nets.features import copy_without_hooks, with_settings

EMBEDDING_DIM = 256
PROJECTION_KEY = "time_embedding.cond_proj.weight"
SHORTEST_WAVELENGTH = 4.0
"""In w, of the columns that are trained. Neighbouring scales look unrelated to a faster one, so that its weights would
learn noise of the few scales that a batch holds."""


def guidance_embedding(w: Float[Tensor, " b"], dim: int = EMBEDDING_DIM) -> Float[Tensor, "b dim"]:
    """The embedding of the scales w that stock pipelines give to a network, in fp32.

    It equals diffusers' `get_guidance_scale_embedding(w - 1, dim)` (after VDM, Kingma et al. 2021).
    """
    angles = (1000.0 * (w.float() - 1))[:, None] * _frequencies(dim).to(w.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def slow_columns(dim: int = EMBEDDING_DIM) -> Bool[Tensor, " dim"]:
    """The columns of the embedding whose wavelength in w is at least `SHORTEST_WAVELENGTH`."""
    return (1000.0 * _frequencies(dim) <= 2 * math.pi / SHORTEST_WAVELENGTH).repeat(2)


def embeds_guidance(unet: UNet2DConditionModel) -> bool:
    """Whether the network takes the guidance scale as an input."""
    return unet.config.time_cond_proj_dim is not None


def embed_guidance(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy in fp32 with the guidance scale as an input, whose projection begins at zero: the outputs are the same."""
    if embeds_guidance(unet):
        return copy_without_hooks(unet)
    copy = _with_projection_dim(unet, EMBEDDING_DIM)
    zero = torch.zeros_like(copy.time_embedding.cond_proj.weight)
    copy.load_state_dict({**unet.state_dict(), PROJECTION_KEY: zero})
    return copy.float().to(unet.device)


@torch.no_grad()
def fold_guidance(unet: UNet2DConditionModel, w: float) -> UNet2DConditionModel:
    """The plain network in fp32 whose outputs are those at the guidance scale w, which it no longer takes.

    The projection comes before a linear layer, so that a fixed one is a shift of its bias: W P e(w).
    """
    weights = {name: value.float() for name, value in unet.state_dict().items()}
    projection = weights.pop(PROJECTION_KEY).double()
    embedding = guidance_embedding(torch.tensor([w], device=unet.device), projection.shape[1])[0].double()
    shift = weights["time_embedding.linear_1.weight"].double() @ (projection @ embedding)
    bias = weights["time_embedding.linear_1.bias"]
    weights["time_embedding.linear_1.bias"] = (bias.double() + shift).float()
    folded = _with_projection_dim(unet, None)
    folded.load_state_dict(weights)
    return folded.float().to(unet.device)


def train_slow_columns(unet: UNet2DConditionModel) -> None:
    """Keep the projection's weights of fast columns where they are: their gradients become zero."""
    weight = unet.time_embedding.cond_proj.weight
    mask = slow_columns(weight.shape[1])
    weight.register_hook(lambda gradient: gradient * mask.to(gradient.device, gradient.dtype))


def _frequencies(dim: int) -> Float[Tensor, " n"]:
    """f_i of the n = dim / 2 pairs of columns, in the arithmetic of the stock pipeline."""
    count = dim // 2
    return torch.exp(torch.arange(count, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (count - 1)))


def _with_projection_dim(unet: UNet2DConditionModel, dim: int | None) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(with_settings(unet.config, time_cond_proj_dim=dim))
