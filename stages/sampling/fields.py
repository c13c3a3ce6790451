"""Solvers of diffusers on our own fields: latents that the stock pipeline would draw, without the pipeline.

Velocity fields of both guidance branches: the student, the bridged teacher, and whatever stands in their place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.solver import VelocityField, expand_time
from stages.nets.scheduler import flow_scheduler
from stages.nets.student import TIME_SCALE, Student
from stages.nets.teacher import Teacher


def unipc(
    velocity: VelocityField, noise: Float[Tensor, "b c h w"], steps: int, shift: float
) -> Float[Tensor, "b c h w"]:
    """UniPC as exports ship it; it tells a model whole times 1000 s, as the stock pipeline does."""
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, expand_time(float(t) / TIME_SCALE, x)), t, x).prev_sample
    return x


@dataclass(frozen=True)
class DdimSolver:
    """DDIM on the discrete steps of a model that lives on the VP path, through that model's linear field."""

    bridge: Bridge
    scheduler: DDIMScheduler
    """It predicts v: any field's answer becomes that, whatever the network itself predicts."""

    def solve(self, velocity: VelocityField, noise: Float[Tensor, "b c h w"], steps: int) -> Float[Tensor, "b c h w"]:
        """Latents at the scheduler's last step.

        x_vp = g x, and v = (sigma - alpha) x_vp + g v_vp with g = alpha + sigma (mathematics, section 1).
        """
        self.scheduler.set_timesteps(steps)
        x_vp = noise
        for k in self.scheduler.timesteps:
            s = float(self.bridge.s_of_k(k[None]))
            g = (s**2 + (1 - s) ** 2) ** -0.5
            v = velocity(x_vp / g, expand_time(s, x_vp))
            v_vp = (v - (2 * s - 1) * g * x_vp) / g
            x_vp = self.scheduler.step(v_vp, int(k), x_vp).prev_sample
        return x_vp


class Branches(Protocol):
    """Velocities (conditional, unconditional), each [b c h w], at the states (x [b c h w], s [b])."""

    def __call__(self, x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TwoBranchField:
    """A velocity field of both branches, and where it wants the inner points of a sampler's grid."""

    branches: Branches
    snap_grid: Callable[[Tensor], Tensor] = lambda grid: grid
    continuous_time: bool = True
    """Whether it answers at every time; a teacher knows its own steps only."""
    ddim_solver: DdimSolver | None = None
    """The steps of stock DDIM, for a model of the VP path."""

    @property
    def supported_solvers(self) -> tuple[str, ...]:
        """Who can solve it."""
        return ("euler", *(("heun", "unipc") if self.continuous_time else ()), *(("ddim",) if self.ddim_solver else ()))


def student_field(student: Student, scheduler: DDIMScheduler | None = None) -> TwoBranchField:
    """The student as a field; any network in the student's place serves (controls among them).

    `scheduler` holds the steps of DDIM for a student of v-prediction.
    """

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        out = student(x, s, cond, uncond)
        return out.v_cond, out.v_uncond

    return TwoBranchField(
        branches, ddim_solver=DdimSolver(student.vp_bridge, scheduler) if student.vp_bridge and scheduler else None
    )


def teacher_field(teacher: Teacher, scheduler: DDIMScheduler | None = None) -> TwoBranchField:
    """The bridged teacher; Euler's method on it, at the teacher's own states, is DDIM.

    `scheduler` holds the steps that other programs take by DDIM.
    """

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = teacher.bridge.nearest_state(s)
        answer = teacher.predict(x, s, k, cond, uncond)
        return answer.v_cond, answer.v_uncond

    ddim = DdimSolver(teacher.bridge, scheduler) if scheduler else None
    return TwoBranchField(branches, teacher.bridge.snap_grid, continuous_time=False, ddim_solver=ddim)
