"""The student: the teacher's UNet, told the path time 1000 s and answering with the velocity."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from stages.nets.features import FeatureTap, last_resnets, unheard

TIME_SCALE = 1000.0


@dataclass(frozen=True)
class StudentOutput:
    """Velocities of both branches and the pooled features of the conditional one."""

    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Student(nn.Module):
    """A velocity field v(x, s, cond) on the linear path."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.tap = FeatureTap(unet)

    @classmethod
    def from_teacher(cls, unet: UNet2DConditionModel) -> "Student":
        """A trainable copy in fp32; the teacher stays as it is."""
        return cls(unheard(unet).requires_grad_(True))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of its blocks, in the order in which they run."""
        return tuple(last_resnets(self.unet))

    def velocity(
        self, x: Float[Tensor, "b c h w"], s: Float[Tensor, " b"], cond: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """v = dx/ds at the state (x, s)."""
        dtype = self.unet.dtype
        told = (TIME_SCALE * s).to(torch.float32)
        velocity: Tensor = self.unet(x.to(dtype), told, cond.to(dtype)).sample
        return velocity.float()

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> StudentOutput:
        """Both branches in one pass."""
        both = torch.cat([cond, uncond.expand_as(cond)])
        v_cond, v_uncond = self.velocity(x.repeat(2, 1, 1, 1), s.repeat(2), both).chunk(2)
        return StudentOutput(v_cond, v_uncond, self.tap.take(slice(0, len(x))))
