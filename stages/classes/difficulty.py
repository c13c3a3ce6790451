"""Many classes, each measured a few times: how much of a difference to believe.

Fay and Herriot (1979): y_c = theta_c + e_c with e_c ~ N(0, s_c^2), theta_c = x_c beta + u_c with u_c ~ N(0, tau^2).
The estimate is g_c y_c + (1 - g_c) x_c beta with g_c = tau^2 / (tau^2 + s_c^2): a class that was measured well keeps
its own mean, and where noise explains all differences (tau = 0) only what the covariates foretell is left of them.

A few pictures of each class by student and teacher, from the same noise.

Which classes need it most, and the priority that follows.

The need of a class is the geometric mean of its paired errors: the logarithms spread alike in all classes (a deviation
of about 1.1 in the embedded world), whereas a plain mean hangs on a few pictures. It is pooled (`pooling`) on what the
cache foretells. Its part of all error is r_c = C f_c need_c / sum f need, f_c the class's share of the cache's records,
pooled likewise.
  top: r_c is above 1 by more than its standard error, or the scorer says that more is lost than two standard errors
  low: r_c is below 1 by more than its standard error
  mid: the rest, among them every class that the measurement cannot tell from an even part.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from stages.classes import Priority
from stages.classes.cached import CacheErrors
from stages.evaluate.metrics import Scorer, shows_everything
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.grids import fixed_noise
from stages.sampling.sampler import Sampler, sample_student, sample_teacher

BISECTION_STEPS = 60
CLASSES_PER_COEFFICIENT = 5
"""Fewer classes than these for each coefficient, and a covariate would fit their noise."""


@dataclass(frozen=True)
class ClassMeans:
    """The mean of independent values in each of C classes, with its standard error."""

    mean: Float[Tensor, " C"]
    standard_error: Float[Tensor, " C"]


@dataclass(frozen=True)
class PooledMeans(ClassMeans):
    """The estimates theta_c; `error` knows of the doubt about beta and the covariates, not about tau."""

    tau: float
    """Deviation of the classes about what the covariates foretell."""


def class_means(values: Sequence[Float[Tensor, " n"]]) -> ClassMeans:
    """The classes' means; their errors come from one deviation for all, since a few values tell their own one badly."""
    counts = torch.tensor([len(own) for own in values], dtype=torch.float64)
    mean = torch.stack([own.double().mean() for own in values])
    within = sum(float((own.double() - m).square().sum()) for own, m in zip(values, mean, strict=True))
    return ClassMeans(mean, (within / (counts.sum() - len(counts)) / counts).sqrt())


def pool_means(measured: ClassMeans, covariates: Sequence[ClassMeans]) -> PooledMeans:
    """The estimates; of the covariates the first ones are used, as many as the number of classes allows."""
    y, variance = measured.mean.double(), measured.standard_error.double().square()
    allowed = max(1, len(y) // CLASSES_PER_COEFFICIENT)
    used = covariates[: allowed - 1]
    x = torch.stack([torch.ones_like(y), *(one.mean.double() - one.mean.double().mean() for one in used)], dim=1)
    blur = torch.stack([torch.zeros_like(y), *(one.standard_error.double().square() for one in used)], dim=1)

    tau2 = _between_class_variance(y, variance, x)
    beta, doubt = _weighted_least_squares(y, variance + tau2, x)
    kept = tau2 / (tau2 + variance)
    mean = kept * y + (1 - kept) * (x @ beta)
    # Prasad and Rao (1990), the first two terms of the mean squared error; Ybarra and Lohr (2008), measured covariates.
    foretold = ((x @ doubt) * x).sum(1) + blur @ beta.square()
    error = (kept * variance + (1 - kept).square() * foretold).sqrt()
    return PooledMeans(mean, error, float(tau2**0.5))


def _weighted_least_squares(y: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """beta by weighted least squares, and its covariance."""
    doubt = torch.linalg.pinv(x.T @ (x / variance[:, None]), hermitian=True)
    return doubt @ (x.T @ (y / variance)), doubt


def _between_class_variance(y: Tensor, variance: Tensor, x: Tensor) -> float:
    """tau^2, at which the weighted squares about the fit are as many as there are degrees of freedom; 0 if never."""
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
class ProbeErrors:
    """n pictures of each of C classes; the same n noises for all of them."""

    paired_errors: Float[Tensor, "C n"]
    """Mean squared difference of the latents, over the variance of all the teacher's."""
    lost_pictures: Float[Tensor, "C n"] | None
    """1 where only the teacher's picture shows all that was said, -1 where only the student's does, else 0; None
    without a scorer."""


def probe_classes(
    student: Student,
    teacher: Teacher,
    prompts: Mapping[str, Sequence[Prompt]],
    seed: int,
    sampler: Sampler,
    scorer: Scorer | None,
) -> ProbeErrors:
    """Draw and compare; every class must have as many prompts as the others."""
    count = len(next(iter(prompts.values())))
    asked = [(prompt.text, number) for listed in prompts.values() for number, prompt in enumerate(listed)]
    uncond = teacher.uncond
    squares, lost, values = [], [], []
    for first in tqdm(range(0, len(asked), sampler.batch_size), desc="probe", disable=None):
        texts, numbers = zip(*asked[first : first + sampler.batch_size], strict=True)
        noise = torch.stack([fixed_noise(seed, number, teacher.components.latent_shape) for number in numbers])
        cond, noise = teacher.encode_texts(texts), noise.to(uncond.device)
        drawn = sample_student(student, cond, uncond, noise, sampler)
        wanted = sample_teacher(teacher, cond, uncond, noise, sampler)
        squares.append((drawn.double() - wanted.double()).square().flatten(1).mean(1).cpu())
        values.append(wanted.double().cpu())
        if scorer is not None:
            shown = [
                shows_everything(scorer(texts, teacher.decode_latents(latents))).float().cpu()
                for latents in (wanted, drawn)
            ]
            lost.append(shown[0] - shown[1])
    errors = torch.cat(squares) / torch.cat(values).var(correction=0)
    return ProbeErrors(errors.view(-1, count), torch.cat(lost).view(-1, count) if scorer is not None else None)


MIN_LOSS_STANDARD_ERRORS = 2.0
"""Standard errors by which pictures must be lost to make a class top, whatever its paired error."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class ClassDifficulty:
    """What was found of one class."""

    pattern: str
    priority: Priority
    relative_error_share: float
    """r: its part of all error over an even part"""
    log_standard_error: float
    """standard error of ln r"""
    paired_error: Estimate
    """geometric mean of the paired errors, as measured"""
    pooled_error: Estimate
    velocity_error: Estimate
    david_difficulty: Estimate | None
    lost_share: Estimate | None
    """share of the pictures that show all that was said: teacher less student"""
    cached_records: int

    @property
    def share_text(self) -> str:
        """r and the interval of one standard error, which is wider upwards."""
        low, high = (self.relative_error_share * math.exp(sign * self.log_standard_error) for sign in (-1, 1))
        return f"{self.relative_error_share:.2f} ({low:.2f}-{high:.2f})"


def rank_classes(
    patterns: Sequence[str], records: Sequence[int], probe_errors: ProbeErrors, cache_errors: CacheErrors
) -> list[ClassDifficulty]:
    """The classes, the neediest first."""
    paired = class_means([own.log() for own in probe_errors.paired_errors])
    velocity = class_means([own.log() for own in cache_errors.velocity_errors])
    difficulty = class_means(cache_errors.difficulties) if cache_errors.difficulties else None
    believed = pool_means(paired, [velocity, *([difficulty] if difficulty else [])])
    lost = (
        [_mean_estimate(values) for values in probe_errors.lost_pictures]
        if probe_errors.lost_pictures is not None
        else [None] * len(patterns)
    )

    parts, errors = relative_error_shares(believed, torch.tensor(records, dtype=torch.float64))
    found = [
        ClassDifficulty(
            pattern,
            assign_priority(float(parts[i]), float(errors[i]), lost[i]),
            float(parts[i]),
            float(errors[i]),
            _geometric_mean(paired, i),
            _geometric_mean(believed, i),
            _geometric_mean(velocity, i),
            Estimate(float(difficulty.mean[i]), float(difficulty.standard_error[i])) if difficulty else None,
            lost[i],
            records[i],
        )
        for i, pattern in enumerate(patterns)
    ]
    return sorted(
        found, key=lambda need: (PRIORITY_ORDER.index(need.priority), -need.relative_error_share, need.pattern)
    )


PRIORITY_ORDER: Sequence[Priority] = ("top", "mid", "low")


def relative_error_shares(
    log_errors: ClassMeans, records: Float[Tensor, " C"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """r of each class, whose mean is 1, and the standard error of ln r; need in logarithms.

    The records are a sample of what is asked for, the variance of ln f_c being 1 / records: frequencies are pooled too,
    so that a difference which chance explains counts for nothing.
    """
    frequency = pool_means(ClassMeans(records.log(), records.rsqrt()), [])
    weighed = (log_errors.mean + frequency.mean).exp()
    return weighed / weighed.mean(), (log_errors.standard_error.square() + frequency.standard_error.square()).sqrt()


def assign_priority(relative_error_share: float, log_standard_error: float, lost_share: Estimate | None) -> Priority:
    """The rule."""
    if math.log(relative_error_share) > log_standard_error or (
        lost_share is not None and lost_share.value > MIN_LOSS_STANDARD_ERRORS * lost_share.standard_error
    ):
        return "top"
    return "low" if math.log(relative_error_share) < -log_standard_error else "mid"


def _mean_estimate(values: Float[Tensor, " n"]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))))


def _geometric_mean(logarithms: ClassMeans, i: int) -> Estimate:
    """exp of a mean of logarithms, with its error to first order."""
    value = float(logarithms.mean[i].exp())
    return Estimate(value, value * float(logarithms.standard_error[i]))
