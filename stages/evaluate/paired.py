"""The paired-noise endpoint error: teacher and student share the ODE, so the same noise must give the same picture.

Mathematics, section 8, squared: PE = mean |x0 - x0*|^2 / var(x0*) over fixed prompts and noises, x0* the teacher's
at many steps. Every number is under the teacher's tail policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from stages.evaluate.fields import Field
from stages.evaluate.sample import Sampler


@dataclass(frozen=True)
class PairedError:
    """The error at a number of steps; the teacher's own there; and that of the teacher's pictures from other noise."""

    steps: int
    student: float
    floor: float
    ceiling: float
    score: float | None
    """(student - floor) / (ceiling - floor): 0 as good as the teacher, 1 unrelated; None where floor >= ceiling."""


@dataclass(frozen=True)
class Task:
    """A fixed list of prompts and noises."""

    cond: Float[Tensor, "b l d"]
    uncond: Float[Tensor, "1 l d"]
    noise: Float[Tensor, "b c h w"]

    def draw(self, field: Field, sampler: Sampler) -> Float[Tensor, "b c h w"]:
        """The field's latents for this list."""
        return sampler.draw(field, self.cond, self.uncond, self.noise)


@dataclass(frozen=True)
class Reference:
    """What the teacher makes of a task, computed once and compared with many fields."""

    task: Task
    sampler: Sampler
    x0: Float[Tensor, "b c h w"]
    ceiling: float
    floors: Mapping[int, float]

    def error(self, x0: Float[Tensor, "b c h w"]) -> float:
        """Squared error of latents, relative to the variance of the reference."""
        return relative_error(x0, self.x0)

    def judge(self, x0: Float[Tensor, "b c h w"], steps: int) -> PairedError:
        """The figures of latents that were drawn in that many steps."""
        found, floor = self.error(x0), self.floors[steps]
        score = (found - floor) / (self.ceiling - floor) if floor < self.ceiling else None
        return PairedError(steps, found, floor, self.ceiling, score)


def relative_error(x0: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> float:
    """Mean squared difference over the variance of all values of the reference."""
    return float((x0.double() - reference.double()).square().mean() / reference.double().var(correction=0))


def make_reference(
    teacher: Field,
    task: Task,
    other_noise: Float[Tensor, "b c h w"],
    sampler: Sampler,
    steps: Sequence[int],
    reference_steps: int = 50,
) -> Reference:
    """Ask the teacher: at `reference_steps`, again from other noise (the ceiling), and at each of `steps` (the floors).

    `sampler` says guidance and shift; the teacher is always sampled by Euler's method at its own states.
    """
    own = sampler.model_copy(update={"solver": "euler"})
    many = own.model_copy(update={"steps": reference_steps})
    x0 = task.draw(teacher, many)
    ceiling = relative_error(Task(task.cond, task.uncond, other_noise).draw(teacher, many), x0)
    few = {n: task.draw(teacher, own.model_copy(update={"steps": n})) for n in steps}
    return Reference(task, sampler, x0, ceiling, {n: relative_error(drawn, x0) for n, drawn in few.items()})


def paired_error(
    field: Field, reference: Reference, steps: int, cond: Float[Tensor, "b l d"] | None = None
) -> PairedError:
    """The error of any field at one of the reference's numbers of steps; `cond` puts in other prompts."""
    task = reference.task if cond is None else Task(cond, reference.task.uncond, reference.task.noise)
    return reference.judge(task.draw(field, reference.sampler.model_copy(update={"steps": steps})), steps)
