"""Per-block assessments: posteriors of pooled features, and how far a student's lie from the teacher's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.flow.timesteps import bin_of_step

BLUR_BINS = 0.75
"""Deviation of q in bins. At 1 the mass within two bins falls short of the true frequency by up to .06."""


@dataclass(frozen=True)
class Posterior:
    """Posteriors of one block's features over time bins and content patterns, and their inclusion ratio."""

    log_bins: Float[Tensor, "b T"]
    """log p(bin | x)"""
    log_patterns: Float[Tensor, "b P"]
    """log p(pattern | x), in the true bin where patterns depend on it"""
    inclusion: Float[Tensor, " b"]
    """in (0, 1]: inclusion ratio of z in the pentachoron of the true bin"""


@dataclass(frozen=True)
class BlockAssessment:
    """How far a student's features are from the teacher's on the same b states, sample by sample."""

    excess: Float[Tensor, " b"]
    """nats: cross-entropy of the bin posterior over the teacher's own on the same state; may be negative"""
    divergence: Float[Tensor, " b"]
    """in [0, 1]: Jensen-Shannon divergence of the pattern posteriors over ln 2"""
    coherence: Float[Tensor, " b"]
    """in [0, 1]: inclusion ratio of student to teacher, at most 1"""
    cross_entropy: Float[Tensor, " b"]
    """nats: the original's raw quantity"""
    entropy: Float[Tensor, " b"]
    """in [0, 1]: entropy of the student's pattern posterior over its maximum, the original's raw quantity"""
    teacher_accuracy: Float[Tensor, " b"]
    """1 where the likeliest bin of the teacher's own features is the true one or a neighbour of it, else 0"""

    def select(self, mask: Bool[Tensor, " b"]) -> "BlockAssessment":
        """The samples of a mask."""
        return BlockAssessment(*(getattr(self, field.name)[mask] for field in fields(self)))


@dataclass(frozen=True)
class Assessment:
    """Means over samples, block by block; the first three lie in [0, 1], the last two are the original's quantities."""

    timestep_error: Float[Tensor, " n_blocks"]
    pattern_error: Float[Tensor, " n_blocks"]
    coherence: Float[Tensor, " n_blocks"]
    cross_entropy: Float[Tensor, " n_blocks"]
    entropy: Float[Tensor, " n_blocks"]

    @classmethod
    def zero_error(cls, w: Float[Tensor, " n_blocks"]) -> "Assessment":
        """That of the teacher's own features, for as many blocks as `w` has."""
        zero = torch.zeros_like(w)
        return cls(zero, zero, torch.ones_like(w), zero, zero)


class Assessor(Protocol):
    """A back-end: `FittedAssessor` on this cache, or `PublishedAssessor`."""

    bins: int
    steps: int
    """of the teacher; each bin takes an equal part of them"""
    patterns: int
    blocks: tuple[str, ...]

    def posterior(self, block: str, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """Posteriors of these features, given the true bin of each sample."""
        ...


def bins_of(k: Int[Tensor, " b"], assessor: Assessor) -> Int[Tensor, " b"]:
    """The bin of a teacher's integer step (never derived from the student's time)."""
    return bin_of_step(k, assessor.bins, assessor.steps)


def soft_targets(bins: Int[Tensor, " b"], bin_count: int) -> Float[Tensor, "b T"]:
    """q, a Gaussian over the bins, since neighbours look alike: q_j ~ exp(-((j - bin) / blur)^2 / 2)."""
    away = (torch.arange(bin_count, device=bins.device) - bins[:, None]) / BLUR_BINS
    return torch.softmax(-away.square() / 2, dim=1)


def js_divergence(log_p: Float[Tensor, "b P"], log_q: Float[Tensor, "b P"]) -> Float[Tensor, " b"]:
    """Jensen-Shannon divergence over ln 2, in [0, 1], and exactly 0 for equal posteriors.

    JS = 1/2 sum_i [p_i log(2 p_i / (p_i + q_i)) + q_i log(2 q_i / (p_i + q_i))]
    """
    twice = (
        _kl_terms_to_mixture(log_p.double(), log_q.double()) + _kl_terms_to_mixture(log_q.double(), log_p.double())
    ).sum(dim=1)
    return (twice / (2 * math.log(2))).clamp(0, 1).float()


def _kl_terms_to_mixture(log_p: Float[Tensor, "b P"], log_q: Float[Tensor, "b P"]) -> Float[Tensor, "b P"]:
    """p log(2 p / (p + q)); where p is near q it is p log(1 + d), d = (p - q) / (p + q), which loses no digits."""
    p, q = log_p.exp(), log_q.exp()
    d = (p - q) / (p + q).clamp_min(torch.finfo(p.dtype).tiny)
    ratio = torch.where(d.abs() < 0.5, torch.log1p(d), math.log(2) + log_p - torch.logaddexp(log_p, log_q))
    return torch.where(p > 0, p * ratio, 0.0)


def assess_block(
    student: Posterior, teacher: Posterior, bins: Int[Tensor, " b"], target: Float[Tensor, "b T"]
) -> BlockAssessment:
    """Compare a student's posterior with the teacher's on the same states, whose `bins` are known; `target` is q.

    excess_i = sum_k q_ik [log p(k | teacher_i) - log p(k | student_i)]   (david.md 7.4)
    """
    entropy = -(student.log_patterns.exp() * student.log_patterns).sum(dim=1)
    off = (teacher.log_bins.argmax(dim=1) - bins).abs()
    return BlockAssessment(
        excess=(target * (teacher.log_bins - student.log_bins)).sum(dim=1),
        divergence=js_divergence(student.log_patterns, teacher.log_patterns),
        coherence=(student.inclusion / teacher.inclusion).clamp(0, 1),
        cross_entropy=-student.log_bins.gather(1, bins[:, None]).squeeze(1),
        entropy=(entropy / math.log(student.log_patterns.shape[1])).clamp(0, 1),
        teacher_accuracy=(off <= 1).float(),
    )


def assess(
    assessor: Assessor,
    student: Mapping[str, Float[Tensor, "b n"]],
    teacher: Mapping[str, Float[Tensor, "b n"]],
    bins: Int[Tensor, " b"],
) -> dict[str, BlockAssessment]:
    """Every block's comparison of a student's features with the teacher's on the same states."""
    target = soft_targets(bins, assessor.bins)
    return {
        block: assess_block(
            assessor.posterior(block, student[block], bins),
            assessor.posterior(block, teacher[block], bins),
            bins,
            target,
        )
        for block in assessor.blocks
    }


def reduce(blocks: Mapping[str, BlockAssessment], bin_count: int) -> Assessment:
    """Means over the samples; the excess is cut off at 0 after averaging, never before.

    E relu(noise) > 0, so a cut of each sample would count noise as an error.
    """

    def means(name: str) -> Float[Tensor, " n_blocks"]:
        return torch.stack([getattr(block, name).mean() for block in blocks.values()])

    lost = torch.stack([(1 - block.coherence).mean() for block in blocks.values()])
    return Assessment(
        timestep_error=(means("excess") / math.log(bin_count)).clamp(0, 1),
        pattern_error=means("divergence").clamp(0, 1),
        coherence=1 - lost.clamp(0, 1),
        cross_entropy=means("cross_entropy"),
        entropy=means("entropy"),
    )
