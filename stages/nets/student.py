"""The student: the teacher's UNet at path time 1000 s, which predicts the velocity, or v on the teacher's path."""

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
from stages.nets.guidance import embeds_guidance, guidance_embedding, train_slow_columns

Target: TypeAlias = Literal["velocity", "vp_v"]
"""What the network predicts: the velocity of the linear path, or v on the teacher's own."""

TIME_SCALE = 1000.0


def make_vp_bridge(target: Target, schedule: NoiseSchedule, tail: TailPolicy) -> Bridge | None:
    """The bridge of a student whose network predicts v on the teacher's path; None for a velocity network."""
    return None if target == "velocity" else Bridge(replace(schedule, prediction_type="v_prediction"), tail)


@dataclass(frozen=True)
class Prediction:
    """Velocities of both branches in fp32 and the pooled features of the conditional one, of teacher or student."""

    v_cond: Float[Tensor, "b c h w"]
    v_uncond: Float[Tensor, "b c h w"]
    features: Mapping[str, Float[Tensor, "b n"]]


class Student(nn.Module):
    """A velocity field v(x, s, cond) on the linear path."""

    def __init__(self, unet: UNet2DConditionModel, vp_bridge: Bridge | None = None) -> None:
        """With `vp_bridge`, of a v-predicting schedule, the network is evaluated on the teacher's VP path.

        Its input is then x g(s) at the fractional step k(s); the velocity field stays one on the linear path.
        """
        super().__init__()
        self.unet, self.vp_bridge = unet, vp_bridge
        self.feature_tap = FeatureTap(unet)

    @classmethod
    def from_teacher(cls, unet: UNet2DConditionModel, vp_bridge: Bridge | None = None) -> "Student":
        """A trainable copy in fp32; the teacher stays as it is."""
        student = cls(copy_without_hooks(unet).requires_grad_(True), vp_bridge)
        if student.embeds_guidance:
            train_slow_columns(student.unet)
        return student

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input and predicts the guided velocity at once."""
        return embeds_guidance(self.unet)

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
        """How the UNet computes; names stay, and outputs but for rounding."""
        self.unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if compile:
            self.unet.compile()

    def velocity(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        guidance: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """v = dx/ds at the state (x, s); guided by the scales `guidance` exactly where the network embeds them."""
        assert (guidance is not None) == self.embeds_guidance
        if self.vp_bridge is None:
            return self._network_output(x, TIME_SCALE * s, cond, guidance)
        k = self.vp_bridge.k_of_s(s)
        output = self._network_output(self.vp_bridge.teacher_input(x, s), k, cond, guidance)
        return self.vp_bridge.velocity(x.float(), s, k, output)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        s: Float[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
        guidance: Float[Tensor, " b"] | None = None,
    ) -> Prediction:
        """Both branches in one pass; of a network that embeds guidance its one branch twice, without features."""
        if guidance is not None:
            velocity = self.velocity(x, s, cond, guidance)
            self.feature_tap.pop_features(slice(0, len(x)))
            return Prediction(velocity, velocity, {})
        both = torch.cat([cond, uncond.expand_as(cond)])
        v_cond, v_uncond = self.velocity(x.repeat(2, 1, 1, 1), s.repeat(2), both).chunk(2)
        return Prediction(v_cond, v_uncond, self.feature_tap.pop_features(slice(0, len(x))))

    def _network_output(
        self,
        network_input: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"],
        cond: Float[Tensor, "b l d"],
        guidance: Float[Tensor, " b"] | None,
    ) -> Float[Tensor, "b c h w"]:
        dtype = self.unet.dtype
        inputs = network_input.to(dtype), timestep.to(torch.float32), cond.to(dtype)
        if guidance is None:
            output: Tensor = self.unet(*inputs).sample
        else:
            embedding = guidance_embedding(guidance, self.unet.config.time_cond_proj_dim)
            output = self.unet(*inputs, timestep_cond=embedding.to(dtype)).sample
        return output.float()
