"""Velocity fields under guidance: the student, the bridged teacher, and any network in their place."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.solver import apply_guidance
from stages.nets.student import TIME_SCALE, Student
from stages.nets.teacher import Teacher
from stages.system.refusal import Refused

Branches: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [b c h w], s [b], cond, uncond) -> velocities (conditional, unconditional), each [b c h w]."""
Guided: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor], Tensor]
"""(x [b c h w], s [b], cond, uncond, guidance scale, one or [b]) -> the guided velocity [b c h w]."""

DEFAULT_GUIDANCE = 5.0
TIME_ROUNDING = 1e-6
"""A time 1000 s that is less below a whole number than this is that number, missed by rounding."""


@dataclass(frozen=True)
class TwoBranchField:
    """A velocity field of both branches, and what its model demands of a solver."""

    branches: Branches
    snap_grid: Callable[[Tensor], Tensor] = lambda grid: grid
    """Moves the inner times of a grid to where the model can be evaluated."""
    continuous_time: bool = True
    """Whether it can be evaluated at every time; a teacher only at its own steps."""
    ddim_steps: tuple[Bridge, DDIMScheduler] | None = None
    """The discrete steps of a model on the VP path; the scheduler predicts v."""
    guided: Guided | None = None
    """The guided velocity in one call; None where it is computed of both branches."""
    windows: int | None = None
    """The steps of a student whose every step is a window of its own; None for any other model."""
    guidance_range: tuple[float, float] | None = None
    """The least and the greatest guidance scale that the network learnt as an input; None where any can be taken."""
    identity: Mapping[str, Any] | None = None
    """All that decides its answers, where what is sampled of it is stored; None where nothing is."""

    def velocity(self, x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor, guidance: float | Tensor) -> Tensor:
        """The velocity under guidance."""
        if self.guided is not None:
            return self.guided(x, s, cond, uncond, guidance)
        return apply_guidance(*self.branches(x, s, cond, uncond), guidance)

    @property
    def default_guidance(self) -> float:
        """`DEFAULT_GUIDANCE`, or the nearest scale that the network learnt."""
        low, high = self.guidance_range or (0.0, math.inf)
        return min(max(DEFAULT_GUIDANCE, low), high)

    def check_guidance(self, guidance: float, option: str) -> None:
        """Raise `Refused` for a scale beyond those that the network learnt as its input."""
        if self.guidance_range is None or self.guidance_range[0] <= guidance <= self.guidance_range[1]:
            return
        low, high = self.guidance_range
        learnt = f"{low:g} alone" if low == high else f"{low:g} to {high:g}"
        raise Refused(
            f"{option} {guidance:g}: the guidance scale is an input of this model, which learnt {learnt} - "
            "choose one of these"
        )


def student_field(
    student: Student,
    scheduler: DDIMScheduler | None = None,
    windows: int | None = None,
    guidance_range: tuple[float, float] | None = None,
) -> TwoBranchField:
    """The student, or any network of its interface; `scheduler` holds the steps of DDIM for one of v-prediction.

    `windows` are the steps of a student that was trained for so many, and `guidance_range` the scales that it learnt.
    """
    assert windows is not None or not student.embeds_guidance
    if windows is not None:
        return _few_step_field(student, windows, guidance_range)

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        out = student(x, s, cond, uncond)
        return out.v_cond, out.v_uncond

    ddim_steps = (student.vp_bridge, scheduler) if student.vp_bridge and scheduler else None
    return TwoBranchField(branches, ddim_steps=ddim_steps)


def _few_step_field(
    student: Student, windows: int, guidance_range: tuple[float, float] | None = None
) -> TwoBranchField:
    """A student that steps along its windows, at whole times, as stock samplers take them.

    Its one branch holds the guidance: as an input, or folded into its weights, where the range is that one scale.
    """

    def guided(x: Tensor, s: Tensor, cond: Tensor, _uncond: Tensor, guidance: float | Tensor) -> Tensor:
        time = (TIME_SCALE * s + TIME_ROUNDING).floor() / TIME_SCALE
        if not student.embeds_guidance:
            return student.velocity(x, time, cond)
        scale = torch.as_tensor(guidance, dtype=torch.float32, device=x.device).expand(len(x))
        return student.velocity(x, time, cond, scale)

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"a student of {windows} steps has no branches: its velocity is guided already")

    return TwoBranchField(branches, guided=guided, windows=windows, guidance_range=guidance_range)


def teacher_field(teacher: Teacher, scheduler: DDIMScheduler | None = None) -> TwoBranchField:
    """The bridged teacher; Euler's method on it, at the teacher's own states, is DDIM.

    `scheduler` holds the steps that other programs take by DDIM.
    """

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = teacher.bridge.nearest_state(s)
        prediction = teacher.predict(x, s, k, cond, uncond)
        return prediction.v_cond, prediction.v_uncond

    ddim_steps = (teacher.bridge, scheduler) if scheduler else None
    return TwoBranchField(branches, teacher.bridge.snap_grid, continuous_time=False, ddim_steps=ddim_steps)
