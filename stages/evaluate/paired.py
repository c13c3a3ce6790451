"""The paired-noise endpoint error: teacher and student share the ODE, so the same noise must give the same picture.

Mathematics, section 8, squared: PE = mean |x0 - x0*|^2 / var(x0*) over fixed prompts and noises, x0* the teacher's
at many steps. Every number is under the teacher's tail policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.sampling.fields import TwoBranchField
from stages.sampling.sampler import Sampler

BOOTSTRAP_RESAMPLES = 2000


@dataclass(frozen=True)
class PairedError:
    """The student's error at a number of steps, the teacher's own there, and that of the teacher from other noise."""

    steps: int
    student: float
    floor: float
    ceiling: float
    score: float | None
    """(student - floor) / (ceiling - floor): 0 as good as the teacher, 1 unrelated; None where floor >= ceiling."""
    interval: tuple[float, float] | None
    """95 % of the scores of resampled lists of pictures; a few pictures carry most of the error."""


@dataclass(frozen=True)
class PairedInputs:
    """A fixed list of prompts and noises."""

    cond: Float[Tensor, "b l d"]
    uncond: Float[Tensor, "1 l d"]
    noise: Float[Tensor, "b c h w"]

    def sample(self, field: TwoBranchField, sampler: Sampler) -> Float[Tensor, "b c h w"]:
        """The field's latents for this list."""
        return sampler.sample(field, self.cond, self.uncond, self.noise)


@dataclass(frozen=True)
class TeacherReference:
    """The teacher's latents and errors (one for each picture), computed once and compared with many fields."""

    inputs: PairedInputs
    sampler: Sampler
    x0: Float[Tensor, "b c h w"]
    ceiling: Float[Tensor, " b"]
    floors: Mapping[int, Float[Tensor, " b"]]

    def compare(self, x0: Float[Tensor, "b c h w"], steps: int) -> PairedError:
        """The errors of latents that were sampled in that many steps."""
        errors = torch.stack([relative_errors(x0, self.x0), self.floors[steps], self.ceiling])
        student, floor, ceiling = errors.mean(1).tolist()
        if floor >= ceiling:
            return PairedError(steps, student, floor, ceiling, None, None)
        return PairedError(steps, student, floor, ceiling, float(normalised_score(errors)), bootstrap_interval(errors))


def normalised_score(errors: Float[Tensor, "3 ... b"]) -> Float[Tensor, "..."]:
    """(student - floor) / (ceiling - floor) of mean errors."""
    student, floor, ceiling = errors.mean(-1)
    shares: Tensor = (student - floor) / (ceiling - floor)
    return shares


def bootstrap_interval(errors: Float[Tensor, "3 b"]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the score: lists of as many pictures, resampled with replacement."""
    count = errors.shape[1]
    rows = torch.randint(count, (BOOTSTRAP_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    low, high = normalised_score(errors[:, rows]).quantile(torch.tensor([0.025, 0.975], dtype=errors.dtype)).tolist()
    return low, high


def relative_errors(x0: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Each picture's mean squared difference, over the variance of all values of the reference; float64, on the CPU."""
    difference = (x0.double() - reference.double()).square().flatten(1).mean(1)
    return (difference / reference.double().var(correction=0)).cpu()


def make_reference(
    teacher: TwoBranchField,
    inputs: PairedInputs,
    other_noise: Float[Tensor, "b c h w"],
    sampler: Sampler,
    steps: Sequence[int],
    reference_steps: int,
) -> TeacherReference:
    """Sample the teacher at `reference_steps`, again from other noise (the ceiling), and at each of `steps` (floors).

    `sampler` gives guidance and shift; the teacher is always sampled by Euler's method at its own states.
    """

    def sample(steps: int, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        own = sampler.for_teacher.model_copy(update={"steps": steps})
        return replace(inputs, noise=noise).sample(teacher, own)

    x0 = sample(reference_steps, inputs.noise)
    ceiling = relative_errors(sample(reference_steps, other_noise), x0)
    floors = {n: relative_errors(sample(n, inputs.noise), x0) for n in steps}
    return TeacherReference(inputs, sampler, x0, ceiling, floors)


def paired_error(
    field: TwoBranchField, reference: TeacherReference, steps: int, cond: Float[Tensor, "b l d"] | None = None
) -> PairedError:
    """The error of any field at one of the reference's numbers of steps; `cond` replaces its prompts."""
    inputs = reference.inputs if cond is None else replace(reference.inputs, cond=cond)
    return reference.compare(inputs.sample(field, reference.sampler.model_copy(update={"steps": steps})), steps)
