"""Which classes of a run are hardest for the student, and the priorities that follow.

Each class is probed with a few pictures of student and teacher from the same noises. Its difficulty is the geometric
mean of its paired errors: their logarithms have the same spread in all classes (in the embedded world a deviation of
about 1.1), whereas a plain mean depends on a few pictures.

Many classes measured a few times are pooled after Fay and Herriot (1979): y_c = theta_c + e_c with e_c ~ N(0, s_c^2),
theta_c = x_c beta + u_c with u_c ~ N(0, tau^2), x_c covariates from the cache. The estimate is
g_c y_c + (1 - g_c) x_c beta with g_c = tau^2 / (tau^2 + s_c^2): a class with a precise mean keeps it, and where noise
explains all differences (tau = 0) only the prediction of the covariates is left of them.

The share of a class in all error, over an even share, is r_c = C f_c d_c / sum f d with d the difficulty and f_c the
class's share of the cache's records, pooled likewise.
  top: r_c is above 1 by more than its standard error, or the scorer's loss is above two standard errors
  low: r_c is below 1 by more than its standard error
  mid: the rest, among them every class that the measurement cannot tell from an even share
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from configs.values import PictureSize
from stages.classes.cached import CacheErrors, mean_squares
from stages.classes.specification import Priority
from stages.evaluate.metrics import Scorer, shows_everything
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.grids import fixed_noise
from stages.sampling.sampler import Sampler, sample_student, sample_teacher

PRIORITY_ORDER: Sequence[Priority] = ("top", "mid", "low")
MIN_LOSS_STANDARD_ERRORS = 2.0
"""A class that loses more pictures than so many standard errors is top, whatever its paired error."""
BISECTION_STEPS = 60
CLASSES_PER_COEFFICIENT = 5
"""With fewer classes for each coefficient a covariate would fit their noise."""


@dataclass(frozen=True)
class ProbeErrors:
    """Of n pictures of each of C classes, with the same n noises for all of them."""

    paired_errors: Float[Tensor, "C n"]
    """Mean squared difference of the latents, over the variance of all the teacher's."""
    lost_pictures: Float[Tensor, "C n"] | None
    """1 where only the teacher's picture shows its whole prompt, -1 where only the student's does, else 0; None
    without a scorer."""


def probe_classes(
    student: Student,
    teacher: Teacher,
    prompts: Mapping[str, Sequence[Prompt]],
    seed: int,
    sampler: Sampler,
    scorer: Scorer | None,
    size: PictureSize | None = None,
) -> ProbeErrors:
    """Sample and compare pictures of `size`, or of the teacher's own; every class must have as many prompts."""
    parts = teacher.components
    size = size or parts.native_size
    sampler = sampler.scaled_to(size, parts.native_size)
    count = len(next(iter(prompts.values())))
    inputs = [(prompt.text, number) for own in prompts.values() for number, prompt in enumerate(own)]
    uncond = teacher.uncond
    squares, lost, values = [], [], []
    for first in tqdm(range(0, len(inputs), sampler.batch_size), desc="probe", disable=None):
        texts, numbers = zip(*inputs[first : first + sampler.batch_size], strict=True)
        noise = torch.stack([fixed_noise(seed, number, parts.latent_shape(size)) for number in numbers])
        cond, noise = teacher.encode_texts(texts), noise.to(uncond.device)
        x0 = sample_student(student, cond, uncond, noise, sampler)
        reference = sample_teacher(teacher, cond, uncond, noise, sampler)
        squares.append(mean_squares(x0.double() - reference.double()).cpu())
        values.append(reference.double().cpu())
        if scorer is not None:
            theirs, ours = (
                shows_everything(scorer(texts, teacher.decode_latents(latents))).float().cpu()
                for latents in (reference, x0)
            )
            lost.append(theirs - ours)
    errors = torch.cat(squares) / torch.cat(values).var(correction=0)
    return ProbeErrors(errors.view(-1, count), torch.cat(lost).view(-1, count) if scorer is not None else None)


@dataclass(frozen=True)
class ClassMeans:
    """The mean of independent values in each of C classes, with its standard error."""

    mean: Float[Tensor, " C"]
    standard_error: Float[Tensor, " C"]


@dataclass(frozen=True)
class PooledMeans(ClassMeans):
    """The estimates of theta_c; their errors include those of beta and of the covariates, not that of tau."""

    tau: float
    """Deviation of the classes about the prediction of the covariates."""


def class_means(values: Sequence[Float[Tensor, " n"]]) -> ClassMeans:
    """The classes' means; one deviation for all gives their errors, as a few values estimate their own one badly."""
    counts = torch.tensor([len(own) for own in values], dtype=torch.float64)
    mean = torch.stack([own.double().mean() for own in values])
    within = sum(float((own.double() - m).square().sum()) for own, m in zip(values, mean, strict=True))
    return ClassMeans(mean, (within / (counts.sum() - len(counts)) / counts).sqrt())


def pool_means(measured: ClassMeans, covariates: Sequence[ClassMeans]) -> PooledMeans:
    """The estimates from as many of the first covariates as the number of classes allows."""
    y, variance = measured.mean.double(), measured.standard_error.double().square()
    allowed = max(1, len(y) // CLASSES_PER_COEFFICIENT)
    used = covariates[: allowed - 1]
    x = torch.stack([torch.ones_like(y), *(one.mean.double() - one.mean.double().mean() for one in used)], dim=1)
    x_variance = torch.stack([torch.zeros_like(y), *(one.standard_error.double().square() for one in used)], dim=1)

    tau2 = _between_class_variance(y, variance, x)
    beta, covariance = _weighted_least_squares(y, variance + tau2, x)
    own_share = tau2 / (tau2 + variance)
    mean = own_share * y + (1 - own_share) * (x @ beta)
    # Prasad and Rao (1990), the first two terms of the mean squared error; Ybarra and Lohr (2008), measured covariates.
    predicted = ((x @ covariance) * x).sum(1) + x_variance @ beta.square()
    error = (own_share * variance + (1 - own_share).square() * predicted).sqrt()
    return PooledMeans(mean, error, float(tau2**0.5))


def _weighted_least_squares(y: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """beta and its covariance."""
    covariance = torch.linalg.pinv(x.T @ (x / variance[:, None]), hermitian=True)
    return covariance @ (x.T @ (y / variance)), covariance


def _between_class_variance(y: Tensor, variance: Tensor, x: Tensor) -> float:
    """tau^2, at which the weighted squares about the fit equal the degrees of freedom; 0 if they never do."""
    freedom = len(y) - x.shape[1]

    def surplus(tau2: float) -> float:
        beta, _ = _weighted_least_squares(y, variance + tau2, x)
        return float(((y - x @ beta).square() / (variance + tau2)).sum()) - freedom

    if freedom <= 0 or surplus(0.0) <= 0:
        return 0.0
    low, high = 0.0, float((y - y.mean()).square().sum())  # every square over the largest: at most one in sum
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class ClassDifficulty:
    """The measurements of one class; errors are geometric means."""

    pattern: str
    priority: Priority
    relative_error_share: float
    """r: its share of all error over an even share"""
    log_standard_error: float
    """standard error of ln r"""
    paired_error: Estimate
    pooled_error: Estimate
    velocity_error: Estimate
    david_difficulty: Estimate | None
    lost_share: Estimate | None
    """share of the pictures that show their whole prompt: teacher less student"""
    cached_records: int

    @property
    def share_text(self) -> str:
        """r and the interval of one standard error, which is wider upwards."""
        low, high = (self.relative_error_share * math.exp(sign * self.log_standard_error) for sign in (-1, 1))
        return f"{self.relative_error_share:.2f} ({low:.2f}-{high:.2f})"


def rank_classes(
    patterns: Sequence[str], records: Sequence[int], probe_errors: ProbeErrors, cache_errors: CacheErrors
) -> list[ClassDifficulty]:
    """The classes, the hardest first."""
    paired = class_means([own.log() for own in probe_errors.paired_errors])
    velocity = class_means([own.log() for own in cache_errors.velocity_errors])
    david = class_means(cache_errors.difficulties) if cache_errors.difficulties else None
    pooled = pool_means(paired, [velocity, *([david] if david else [])])
    shares, errors = relative_error_shares(pooled, torch.tensor(records, dtype=torch.float64))

    def measured(i: int) -> ClassDifficulty:
        share, error = float(shares[i]), float(errors[i])
        lost = None if probe_errors.lost_pictures is None else _mean_estimate(probe_errors.lost_pictures[i])
        return ClassDifficulty(
            patterns[i],
            assign_priority(share, error, lost),
            share,
            error,
            _geometric_mean(paired, i),
            _geometric_mean(pooled, i),
            _geometric_mean(velocity, i),
            Estimate(float(david.mean[i]), float(david.standard_error[i])) if david else None,
            lost,
            records[i],
        )

    return sorted(
        map(measured, range(len(patterns))),
        key=lambda one: (PRIORITY_ORDER.index(one.priority), -one.relative_error_share, one.pattern),
    )


def relative_error_shares(
    log_errors: ClassMeans, records: Float[Tensor, " C"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """r of each class, whose mean is 1, and the standard error of ln r, from the logarithms of the difficulties.

    The records are a sample of the prompts, the variance of ln f_c being 1 / records: frequencies are pooled too, so
    that a difference within chance counts for nothing.
    """
    frequency = pool_means(ClassMeans(records.log(), records.rsqrt()), [])
    error = (log_errors.mean + frequency.mean).exp()
    return error / error.mean(), (log_errors.standard_error.square() + frequency.standard_error.square()).sqrt()


def assign_priority(relative_error_share: float, log_standard_error: float, lost_share: Estimate | None) -> Priority:
    """The rule of the module's docstring."""
    loses = lost_share is not None and lost_share.value > MIN_LOSS_STANDARD_ERRORS * lost_share.standard_error
    if loses or math.log(relative_error_share) > log_standard_error:
        return "top"
    return "low" if math.log(relative_error_share) < -log_standard_error else "mid"


def _mean_estimate(values: Float[Tensor, " n"]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def _geometric_mean(logarithms: ClassMeans, i: int) -> Estimate:
    """exp of a mean of logarithms, with its error to first order."""
    value = float(logarithms.mean[i].exp())
    return Estimate(value, value * float(logarithms.standard_error[i]))
