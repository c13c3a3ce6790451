"""Velocity fields of both guidance branches: the student, the bridged teacher, and whatever stands in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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


def student_field(student: Student) -> Field:
    """The student as a field; any network in the student's place serves (controls among them)."""

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        out = student(x, s, cond, uncond)
        return out.v_cond, out.v_uncond

    return Field(branches)


def teacher_field(teacher: Teacher) -> Field:
    """The bridged teacher; Euler's method on it, at the teacher's own states, is DDIM."""

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = teacher.bridge.nearest_state(s)
        answer = teacher.answer(x, s, k, cond, uncond)
        return answer.v_cond, answer.v_uncond

    return Field(branches, teacher.bridge.snap)
