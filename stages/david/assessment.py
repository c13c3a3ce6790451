"""What David says about a block, and what he must know to say it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """What one block's features say: of the time, of the content, and where they lie."""

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
    """nats: cross-entropy of the bin posterior over the teacher's own on the same state; may be negative, see
    `Assessment`"""
    divergence: Float[Tensor, " b"]
    """in [0, 1]: Jensen-Shannon divergence of the pattern posteriors over ln 2"""
    coherence: Float[Tensor, " b"]
    """in [0, 1]: inclusion ratio of student to teacher, at most 1"""
    cross_entropy: Float[Tensor, " b"]
    """nats: the original's raw quantity"""
    entropy: Float[Tensor, " b"]
    """in [0, 1]: entropy of the student's pattern posterior over its maximum, the original's raw quantity"""


@dataclass(frozen=True)
class Assessment:
    """Three numbers for each block, all in [0, 1]; exactly (0, 0, 1) when the student's features are the teacher's."""

    timestep_error: Mapping[str, Float[Tensor, ""]]
    pattern_error: Mapping[str, Float[Tensor, ""]]
    coherence: Mapping[str, Float[Tensor, ""]]


class Assessor(Protocol):
    """A back-end: `Fitted` on this cache, or `Published` weights."""

    bins: int
    patterns: int
    blocks: tuple[str, ...]

    def posterior(self, block: str, features: Float[Tensor, "b n"], bins: Int[Tensor, " b"]) -> Posterior:
        """What these features say, given the true bin of each sample."""
        ...
