"""Velocity fields of both guidance branches: the student, the bridged teacher, and whatever stands in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from diffusers import DDIMScheduler
from torch import Tensor

from stages.evaluate.stock_solvers import Ddim
from stages.nets.student import Student
from stages.nets.teacher import Teacher


class Branches(Protocol):
    """Velocities (conditional, unconditional), each [b c h w], at the states (x [b c h w], s [b])."""

    def __call__(self, x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Field:
    """A velocity field of both branches, and where it wants the inner points of a sampler's grid."""

    branches: Branches
    snap: Callable[[Tensor], Tensor] = lambda grid: grid
    anywhere: bool = True
    """Whether it answers at every time; a teacher knows its own steps only."""
    ddim: Ddim | None = None
    """The steps of stock DDIM, for a model of the VP path."""

    @property
    def solvers(self) -> tuple[str, ...]:
        """Who can solve it."""
        return ("euler", *(("heun", "unipc") if self.anywhere else ()), *(("ddim",) if self.ddim else ()))


def student_field(student: Student, scheduler: DDIMScheduler | None = None) -> Field:
    """The student as a field; any network in the student's place serves (controls among them).

    `scheduler` holds the steps of DDIM for a student of v-prediction.
    """

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        out = student(x, s, cond, uncond)
        return out.v_cond, out.v_uncond

    return Field(branches, ddim=Ddim(student.vp, scheduler) if student.vp and scheduler else None)


def teacher_field(teacher: Teacher, scheduler: DDIMScheduler | None = None) -> Field:
    """The bridged teacher; Euler's method on it, at the teacher's own states, is DDIM.

    `scheduler` holds the steps that other programs take by DDIM.
    """

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = teacher.bridge.nearest_state(s)
        answer = teacher.answer(x, s, k, cond, uncond)
        return answer.v_cond, answer.v_uncond

    ddim = Ddim(teacher.bridge, scheduler) if scheduler else None
    return Field(branches, teacher.bridge.snap, anywhere=False, ddim=ddim)
