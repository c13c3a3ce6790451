"""States of b prompts with the teacher's predictions there: on its guided sampling, and of renoised pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.record import BlockFeatures, States
from stages.flow.path import interpolate, per_sample
from stages.flow.solver import apply_guidance
from stages.nets.student import Prediction
from stages.nets.teacher import Teacher
from stages.prompts import Prompt


@dataclass(frozen=True)
class PromptRandomness:
    """Every random choice of one prompt, sampled on the CPU from its own seed: no batch or device changes it."""

    guidance_scale: float
    times: Float[Tensor, " n"]
    noise: Float[Tensor, "c h w"]
    kept_steps: Int[Tensor, " m"]
    renoised_times: Float[Tensor, " r"]
    renoised_noise: Float[Tensor, "r c h w"]


@dataclass(frozen=True)
class TeacherState:
    """One state of each of b prompts, and the teacher's prediction there."""

    k: Int[Tensor, " b"]
    s: Float[Tensor, " b"]
    x_s: Float[Tensor, "b c h w"]
    prediction: Prediction


class ConditionedTeacher:
    """The teacher under the conditioning of one batch of prompts."""

    def __init__(self, teacher: Teacher, prompts: Sequence[Prompt]) -> None:
        self.teacher = teacher
        self.cond = teacher.encode_texts([prompt.text for prompt in prompts]).half()
        self.uncond = teacher.uncond.half()

    def evaluate(self, x: Float[Tensor, "b c h w"], s: Float[Tensor, " b"]) -> TeacherState:
        """The prediction at the teacher's nearest time; x is rounded to its stored precision **before** that."""
        k, known = self.teacher.bridge.nearest_state(s)
        s_stored, x_stored = known.float(), x.half().float()
        return TeacherState(k, s_stored, x_stored, self.teacher.predict(x_stored, s_stored, k, self.cond, self.uncond))

    def sample_guided(
        self, noise: Float[Tensor, "b c h w"], times: Float[Tensor, "n b"], scale: Float[Tensor, " b"]
    ) -> tuple[list[TeacherState], Float[Tensor, "b c h w"]]:
        """The teacher's own guided sampling: every state on the way, and x0.

        Euler's method on the bridged velocity, between the teacher's own states, is DDIM.
        """
        x, trajectory = noise, []
        grid = torch.cat([times, torch.zeros_like(times[:1])])
        for s, s_next in pairwise(grid):
            state = self.evaluate(x, s)
            v = apply_guidance(state.prediction.v_cond, state.prediction.v_uncond, scale)
            x = state.x_s + per_sample(s_next - state.s, v) * v
            trajectory.append(state)
        return trajectory, x

    def renoise(self, x0: Float[Tensor, "b c h w"], chosen: Sequence[PromptRandomness]) -> list[TeacherState]:
        """The finished pictures under each of their fresh noises, at the teacher's nearest times."""
        times = torch.stack([choice.renoised_times for choice in chosen], dim=1).to(x0.device)
        noises = torch.stack([choice.renoised_noise for choice in chosen], dim=1).to(x0.device)
        states = []
        for s, eps in zip(times, noises, strict=True):
            _, known = self.teacher.bridge.nearest_state(s)
            states.append(self.evaluate(interpolate(x0, eps, known), known))
        return states


def stack_states(
    trajectory: Sequence[TeacherState], renoised: Sequence[TeacherState], row: int
) -> tuple[States, BlockFeatures]:
    """One prompt's states as they are stored: fp16, on the CPU."""
    states = [*trajectory, *renoised]

    def stack(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value[row] for value in values]).cpu()

    stacked = States(
        k=stack(state.k for state in states),
        s=stack(state.s for state in states),
        x_s=stack(state.x_s for state in states).half(),
        v_cond=stack(state.prediction.v_cond for state in states).half(),
        v_uncond=stack(state.prediction.v_uncond for state in states).half(),
        trajectory=torch.arange(len(states)) < len(trajectory),
    )
    blocks = states[0].prediction.features
    return stacked, BlockFeatures({b: stack(state.prediction.features[b] for state in states).half() for b in blocks})
