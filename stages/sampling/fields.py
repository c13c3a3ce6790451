"""Velocity fields of both guidance branches: the student, the bridged teacher, and any network in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from diffusers import DDIMScheduler
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.nets.student import Student
from stages.nets.teacher import Teacher

Branches: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [b c h w], s [b], cond, uncond) -> velocities (conditional, unconditional), each [b c h w]."""


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


def student_field(student: Student, scheduler: DDIMScheduler | None = None) -> TwoBranchField:
    """The student, or any network of its interface; `scheduler` holds the steps of DDIM for one of v-prediction."""

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        out = student(x, s, cond, uncond)
        return out.v_cond, out.v_uncond

    ddim_steps = (student.vp_bridge, scheduler) if student.vp_bridge and scheduler else None
    return TwoBranchField(branches, ddim_steps=ddim_steps)


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
