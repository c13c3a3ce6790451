"""Latents of velocity fields under guidance: the solver's settings, and sampling in batches."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.values import PictureSize, Strict
from stages.flow.solver import VelocityField
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import DEFAULT_GUIDANCE, TwoBranchField, student_field, teacher_field
from stages.sampling.solvers import (
    SHIFTABLE,
    SOLVERS,
    OdeSolver,
    ShiftableSolverName,
    describe_solvers,
    supported_solvers,
)
from stages.system.refusal import Refused

DEFAULT_STEPS = 25
MAX_SAMPLER_STEPS = 10_000
"""Beyond it nothing changes but the time."""


class Sampler(Strict):
    """How latents are sampled from a field: the settings of the ODE solver."""

    solver: ShiftableSolverName = Field("euler", description=describe_solvers(SHIFTABLE))
    steps: int = Field(DEFAULT_STEPS, ge=1, le=MAX_SAMPLER_STEPS, description="steps from noise to data")
    guidance: float = Field(DEFAULT_GUIDANCE, ge=0, description="guidance scale w; 1 is the conditional branch alone")
    shift: float = Field(1.0, gt=0, description="shift S of the time grid, a pure number; above 1 leans to noise")
    batch_size: int = Field(
        64, ge=1, description="pictures of the model's own size that are sampled together; fewer of larger ones"
    )

    @property
    def for_teacher(self) -> "Sampler":
        """The same with Euler's method, the one solver of a teacher."""
        return self.model_copy(update={"solver": "euler"})

    def scaled_to(self, size: PictureSize, native: PictureSize) -> "Sampler":
        """The same with as many fewer pictures at once as those of `size` are larger than the native ones."""
        if size.pixels <= native.pixels:
            return self
        return self.model_copy(update={"batch_size": max(1, self.batch_size * native.pixels // size.pixels)})

    def sample(
        self,
        field: TwoBranchField,
        cond: Float[Tensor, "b l d"],
        uncond: Float[Tensor, "1 l d"],
        noise: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """Latents at s = 0 of each row of noise, in fp32; raises `Refused` as `steps_for` does."""
        solve = SOLVERS[self.solver].make(field, self.steps_for(field), self.shift)
        return sample_latents(field, cond, uncond, noise, solve, self.guidance, self.batch_size)

    def steps_for(self, field: TwoBranchField) -> int:
        """The number of steps; raises `Refused` for settings that the field's model excludes.

        A student of few steps takes its own where they are left at their default.
        """
        if obstacle := SOLVERS[self.solver].obstacle(field):
            raise Refused(f"sampler.solver {self.solver}: {obstacle} - use {' or '.join(supported_solvers(field))}")
        field.check_guidance(self.guidance, "sampler.guidance")
        check_shift(field, self.shift, "sampler.shift")
        return check_steps(field, None if self.steps == DEFAULT_STEPS else self.steps, "sampler.steps")


def check_steps(field: TwoBranchField, steps: int | None, option: str) -> int:
    """The number of steps; by default `DEFAULT_STEPS`, or those that a student of few steps was trained for.

    Raises `Refused` for any other number with such a student.
    """
    if field.windows is None:
        return DEFAULT_STEPS if steps is None else steps
    if steps not in (None, field.windows):
        raise Refused(f"{option} {steps}: this student samples in {field.windows} - leave it out, or take that")
    return field.windows


def check_shift(field: TwoBranchField, shift: float, option: str) -> None:
    """Raise `Refused` for a shift that moves the windows of a student of few steps."""
    if field.windows is not None and shift != 1:
        raise Refused(f"{option} {shift:g}: this student steps along windows of its own, at shift 1 - leave it out")


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
    """Latents of each row of noise, by any solver of the guided field, `batch_size` rows at once."""
    batches = torch.arange(len(noise)).split(batch_size)
    return torch.cat(
        [solve(_guided_velocity(field, cond[rows], uncond, guidance), noise[rows].float()) for rows in batches]
    )


def _guided_velocity(field: TwoBranchField, cond: Tensor, uncond: Tensor, guidance: float) -> VelocityField:
    return lambda x, s: field.velocity(x, s, cond, uncond, guidance)


def sample_student(
    student: Student,
    cond: Tensor,
    uncond: Tensor,
    noise: Tensor,
    sampler: Sampler,
    windows: int | None = None,
    guidance_range: tuple[float, float] | None = None,
) -> Tensor:
    """The student's latents of each row of noise; shapes as in `Sampler.sample`, the last two as in `student_field`."""
    field = student_field(student, windows=windows, guidance_range=guidance_range)
    return sampler.sample(field, cond, uncond, noise)


def sample_teacher(teacher: Teacher, cond: Tensor, uncond: Tensor, noise: Tensor, sampler: Sampler) -> Tensor:
    """The teacher's latents of each row of noise, by Euler's method at its own states whatever `sampler.solver` is."""
    return sampler.for_teacher.sample(teacher_field(teacher), cond, uncond, noise)
