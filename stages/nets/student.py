"""The student: the teacher's UNet, told the path time 1000 s and answering with the velocity, or v-prediction."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from stages.flow.bridge import Bridge, TailPolicy
from stages.flow.schedule import NoiseSchedule
from stages.nets.features import FeatureTap, copy_without_hooks, last_resnets

Target: TypeAlias = Literal["velocity", "vp_v"]
"""What the network answers with: the velocity of the linear path, or v-prediction on the teacher's own."""

TIME_SCALE = 1000.0


def make_vp_bridge(target: Target, schedule: NoiseSchedule, tail: TailPolicy) -> Bridge | None:
    """The bridge that a student of this target speaks through."""
    return None if target == "velocity" else Bridge(replace(schedule, prediction_type="v_prediction"), tail)


@dataclass(frozen=True)
class Prediction:
    """Velocities of both branches and the pooled features of the conditional one."""

    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Student(nn.Module):
    """A velocity field v(x, s, cond) on the linear path."""

    def __init__(self, unet: UNet2DConditionModel, vp_bridge: Bridge | None = None) -> None:
        """With `vp`, the bridge of a v-predicting schedule, the network itself lives on the teacher's VP path.

        It is then shown x g(s) at the fractional step k(s) and answers with v-prediction; outside it is the same field.
        """
        super().__init__()
        self.unet, self.vp_bridge = unet, vp_bridge
        self.feature_tap = FeatureTap(unet)

    @classmethod
    def from_teacher(cls, unet: UNet2DConditionModel, vp_bridge: Bridge | None = None) -> "Student":
        """A trainable copy in fp32; the teacher stays as it is."""
        return cls(copy_without_hooks(unet).requires_grad_(True), vp_bridge)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of its blocks, in the order in which they run."""
        return tuple(last_resnets(self.unet))

    def configure_compute(
        self,
        *,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        channels_last: bool = False,
    ) -> None:
        """How the UNet computes, which changes neither its names nor, but for rounding, its answers."""
        self.unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if compile:
            self.unet.compile()

    def velocity(
        self, x: Float[Tensor, "b c h w"], s: Float[Tensor, " b"], cond: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        """v = dx/ds at the state (x, s)."""
        if self.vp_bridge is None:
            return self._network_output(x, TIME_SCALE * s, cond)
        k = self.vp_bridge.k_of_s(s)
        return self.vp_bridge.velocity(
            x.float(), s, k, self._network_output(self.vp_bridge.teacher_input(x, s), k, cond)
        )

    def _network_output(
        self, network_input: Float[Tensor, "b c h w"], timestep: Float[Tensor, " b"], cond: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b c h w"]:
        dtype = self.unet.dtype
        answer: Tensor = self.unet(network_input.to(dtype), timestep.to(torch.float32), cond.to(dtype)).sample
        return answer.float()

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
    ) -> Prediction:
        """Both branches in one pass."""
        both = torch.cat([cond, uncond.expand_as(cond)])
        v_cond, v_uncond = self.velocity(x.repeat(2, 1, 1, 1), s.repeat(2), both).chunk(2)
        return Prediction(v_cond, v_uncond, self.feature_tap.pop_features(slice(0, len(x))))
