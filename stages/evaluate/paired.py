"""The paired-noise endpoint error: teacher and student share the ODE, so the same noise must give the same picture.

Mathematics, section 8, squared: PE = mean |x0 - x0*|^2 / var(x0*) over fixed prompts and noises, x0* the teacher's
at many steps. Every number is under the teacher's tail policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.values import PictureSize
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.sampling.fields import TwoBranchField, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler

BOOTSTRAP_RESAMPLES = 2000
REFERENCE_FACTOR = 2
"""Steps of the teacher's reference for each of the most steps that are compared, where nobody chooses them."""


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
class PairedComparison:
    """One field against another on the same pictures, with 95 % intervals of resampled lists, the same for both."""

    steps: int
    difference: float | None
    """The first score minus the other; None where there is no score."""
    difference_interval: tuple[float, float] | None
    ratio: float
    """The first error over the other."""
    ratio_interval: tuple[float, float]


@dataclass(frozen=True)
class PairedInputs:
    """A fixed list of prompts and noises."""

    cond: Float[Tensor, "b l d"]
    uncond: Float[Tensor, "1 l d"]
    noise: Float[Tensor, "b c h w"]

    def rows(self, rows: slice) -> "PairedInputs":
        """Some of the rows."""
        return PairedInputs(self.cond[rows], self.uncond, self.noise[rows])

    def with_cond(self, cond: Float[Tensor, "b l d"]) -> "PairedInputs":
        """The same noises with other prompts."""
        return replace(self, cond=cond)

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

    def rows(self, rows: slice) -> "TeacherReference":
        """The same of some of the pictures."""
        floors = {steps: errors[rows] for steps, errors in self.floors.items()}
        return replace(self, inputs=self.inputs.rows(rows), x0=self.x0[rows], ceiling=self.ceiling[rows], floors=floors)

    def picture_errors(self, field: TwoBranchField, steps: int) -> Float[Tensor, " b"]:
        """Each picture's error, sampled from a field in one of the reference's numbers of steps."""
        return relative_errors(self.inputs.sample(field, self.sampler.model_copy(update={"steps": steps})), self.x0)

    def compare(self, x0: Float[Tensor, "b c h w"], steps: int) -> PairedError:
        """The errors of latents that were sampled in that many steps."""
        return self.summarise(relative_errors(x0, self.x0), steps)

    def summarise(self, student_errors: Float[Tensor, " b"], steps: int) -> PairedError:
        """The error of a field from those of its pictures."""
        errors = torch.stack([student_errors, self.floors[steps], self.ceiling])
        student, floor, ceiling = errors.mean(1).tolist()
        if floor >= ceiling:
            return PairedError(steps, student, floor, ceiling, None, None)
        return PairedError(steps, student, floor, ceiling, float(normalised_score(errors)), bootstrap_interval(errors))

    def compare_fields(self, one: Float[Tensor, " b"], other: Float[Tensor, " b"], steps: int) -> PairedComparison:
        """Two fields by the errors of their pictures."""
        floor, ceiling = self.floors[steps], self.ceiling
        rows = resampled_rows(len(one))

        def difference(one: Tensor, other: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
            return (one.mean(-1) - other.mean(-1)) / (ceiling.mean(-1) - floor.mean(-1))

        ratio = float(one.mean() / other.mean())
        ratio_interval = interval_of(one[rows].mean(-1) / other[rows].mean(-1))
        if float(floor.mean()) >= float(ceiling.mean()):
            return PairedComparison(steps, None, None, ratio, ratio_interval)
        errors = (one, other, floor, ceiling)
        of_lists = difference(*(values[rows] for values in errors))
        return PairedComparison(steps, float(difference(*errors)), interval_of(of_lists), ratio, ratio_interval)


def normalised_score(errors: Float[Tensor, "3 ... b"]) -> Float[Tensor, "..."]:
    """(student - floor) / (ceiling - floor) of mean errors."""
    student, floor, ceiling = errors.mean(-1)
    shares: Tensor = (student - floor) / (ceiling - floor)
    return shares


def bootstrap_interval(errors: Float[Tensor, "3 b"]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the score: lists of as many pictures, resampled with replacement."""
    return interval_of(normalised_score(errors[:, resampled_rows(errors.shape[1])]))


def resampled_rows(count: int) -> Int[Tensor, "resamples count"]:
    """The pictures of each resampled list, the same at every call."""
    return torch.randint(count, (BOOTSTRAP_RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def interval_of(values: Float[Tensor, " resamples"]) -> tuple[float, float]:
    """The middle 95 % of what resampled lists yield."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
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
    inputs = reference.inputs if cond is None else reference.inputs.with_cond(cond)
    return reference.compare(inputs.sample(field, reference.sampler.model_copy(update={"steps": steps})), steps)


def teacher_reference(
    teacher: Teacher,
    texts: Sequence[str],
    seed: int,
    sampler: Sampler,
    size: PictureSize,
    steps: Sequence[int],
    reference_steps: int | None = None,
) -> TeacherReference:
    """The teacher's reference for pictures of one size: a longer list of texts begins with the same noises."""
    parts, cond = teacher.components, teacher.encode_texts(texts)
    noise, other = (
        fixed_noises(one, len(texts), parts.latent_shape(size)).to(cond.device)
        for one in (seed, derived_seed("other noise", seed))
    )
    inputs, scaled = PairedInputs(cond, teacher.uncond, noise), sampler.scaled_to(size, parts.native_size)
    reference_steps = reference_steps or REFERENCE_FACTOR * max(steps)
    return make_reference(teacher_field(teacher), inputs, other, scaled, steps, reference_steps)
