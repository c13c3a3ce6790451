"""A closed-form start: the student's time embedding reads 1000 s where the teacher's reads its step k(s)."""

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.nets.student import TIME_SCALE

GRID_POINTS = 4001
RIDGE_FACTOR = 1e-6


@torch.no_grad()
def graft_time_embedding(unet: UNet2DConditionModel, bridge: Bridge) -> float:
    """Re-solve `linear_2` in place by ridge regression so that emb(1000 s) = emb_teacher(k(s)) on a fine grid of s.

    Returns the relative error left (mathematics.md section 3). Only `linear_2` changes; names and shapes stay.
    """
    second = unet.time_embedding.linear_2
    s = torch.linspace(0, 1, GRID_POINTS, dtype=torch.float64, device=second.weight.device)
    target = _embedding_activations(unet, bridge.k_of_s(s).float()) @ second.weight.double().T + second.bias.double()
    inputs = _embedding_activations(unet, (TIME_SCALE * s).float())
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    gram = inputs.T @ inputs
    ridge = RIDGE_FACTOR * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, inputs.T @ target)
    second.weight.copy_(solution[:-1].T)
    second.bias.copy_(solution[-1])
    return float((inputs @ solution - target).norm() / target.norm())


def _embedding_activations(unet: UNet2DConditionModel, t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """The input of the second layer of the time embedding, in float64."""
    embedding = unet.time_embedding
    activated: Tensor = embedding.act(embedding.linear_1(unet.time_proj(t).to(embedding.linear_1.weight)))
    return activated.double()
