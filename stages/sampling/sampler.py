"""Latents from velocity fields: the solver and its settings."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field as Knob
from torch import Tensor

from configs.values import Strict
from stages.flow import solver
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import TwoBranchField, student_field, teacher_field, unipc

MAX_SAMPLER_STEPS = 10_000
"""Beyond it nothing changes but the time."""
OdeSolver: TypeAlias = Callable[[solver.VelocityField, Tensor], Tensor]
"""From noise [b c h w] at s = 1 to latents [b c h w]."""


class Sampler(Strict):
    """How latents are drawn from a field: the settings of the ODE solver."""

    solver: Literal["euler", "heun", "unipc"] = Knob(
        "euler", description="euler: one call a step; heun: two, of order 2; unipc: one, as stock diffusers samples"
    )
    steps: int = Knob(25, ge=1, le=MAX_SAMPLER_STEPS, description="steps from noise to data")
    guidance: float = Knob(5.0, ge=0, description="guidance scale w; 1 is the conditional branch alone")
    shift: float = Knob(1.0, gt=0, description="shift S of the time grid, a pure number; above 1 leans to noise")
    batch_size: int = Knob(64, ge=1, description="pictures that are sampled together")

    def sample(
        self,
        field: TwoBranchField,
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
        noise: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """The field's answer to each row of noise: latents at s = 0, in fp32."""
        return sample_latents(field, cond, uncond, noise, self.solver_for(field), self.guidance, self.batch_size)

    def solver_for(self, field: TwoBranchField) -> OdeSolver:
        """The solver on its own grid, moved to where the field can answer."""
        if self.solver == "unipc":
            return partial(unipc, steps=self.steps, shift=self.shift)
        grid = field.snap_grid(solver.uniform_grid(self.steps, self.shift))
        return partial(solver.heun if self.solver == "heun" else solver.euler, grid=grid)


@torch.inference_mode()
def sample_latents(
    field: TwoBranchField,
    cond: Float[Tensor, "b l d"],
    uncond: Float[Tensor, "1 l d"],
    noise: Float[Tensor, "b c h w"],
    solve: OdeSolver,
    guidance: float,
    batch_size: int,
) -> Float[Tensor, "b c h w"]:
    """Latents for each row of noise, by any solver of the guided field, `batch_size` rows at once."""
    batches = torch.arange(len(noise)).split(batch_size)
    return torch.cat(
        [solve(_guided_velocity(field, cond[rows], uncond, guidance), noise[rows].float()) for rows in batches]
    )


def _guided_velocity(field: TwoBranchField, cond: Tensor, uncond: Tensor, guidance: float) -> solver.VelocityField:
    def velocity(x: Tensor, s: Tensor) -> Tensor:
        return solver.apply_guidance(*field.branches(x, s, cond, uncond), guidance)

    return velocity


def sample_student(
    student: Student,
    cond: Float[Tensor, "b l d"],
    uncond: Float[Tensor, "1 l d"],
    noise: Float[Tensor, "b c h w"],
    sampler: Sampler,
) -> Float[Tensor, "b c h w"]:
    """The student's latents for each row of noise."""
    return sampler.sample(student_field(student), cond, uncond, noise)


def sample_teacher(
    teacher: Teacher,
    cond: Float[Tensor, "b l d"],
    uncond: Float[Tensor, "1 l d"],
    noise: Float[Tensor, "b c h w"],
    sampler: Sampler,
) -> Float[Tensor, "b c h w"]:
    """The teacher's latents for each row of noise, by Euler's method at its own states, whatever solver is asked."""
    return sampler.model_copy(update={"solver": "euler"}).sample(teacher_field(teacher), cond, uncond, noise)
