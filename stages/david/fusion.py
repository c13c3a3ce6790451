"""How David's judgement becomes lambda_b, the weight of each block's loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from configs.values import Strict
from stages.system.refusal import Refused

DEFAULT_BLOCK_WEIGHTS = {"down_0": 0.7, "down_1": 0.9, "down_2": 1.0, "down_3": 1.1, "mid": 1.2}
DEFAULT_BLOCK_WEIGHTS |= {"up_0": 1.1, "up_1": 1.0, "up_2": 0.9, "up_3": 0.7}
"""The original's w_b (david.md 4.1)."""

PerBlock: TypeAlias = Float[Tensor, " n_blocks"]


class FusionConfig(Strict):
    """lambda_b = clip(w_b (1 + alpha e_t + beta e_p + delta (1 - coherence)), bounds), and its alternatives."""

    formula: Literal["static", "uniform", "absolute", "relative", "mean_kept", "softmax", "seed", "permuted"] = Field(
        "relative",
        description="static: w_b; uniform: their mean; absolute: the formula on numbers in [0, 1]; relative: on "
        "e / (e + e_ref), e_ref the response to noise of half a deviation; mean_kept: relative, the mean of lambda "
        "held at that of w_b; softmax: relative's emphasis as a softmax over the blocks; seed: on cross-entropy in "
        "nats, entropy and alpha, as the original meant it (it saturates); permuted: relative, on what David says of "
        "other blocks (a placebo)",
    )
    alpha: float = Field(0.5, ge=0, description="weight of the timestep error")
    beta: float = Field(0.25, ge=0, description="weight of the pattern error")
    delta: float = Field(0.25, ge=0, description="weight of lost coherence")
    bounds: tuple[float, float] = Field((0.5, 3.0), description="lowest and highest lambda of the formula")
    block_weights: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        DEFAULT_BLOCK_WEIGHTS, description="w_b, the lambda of a faultless block; 1 for a block not named"
    )
    seed_coherence: float = Field(
        0.5, description="coherence that the seed formula reads where David brings no alpha: what alpha starts from"
    )
    warmup_samples: int = Field(3200, ge=0, description="samples over which lambda goes from w_b to David's")
    half_life_samples: int = Field(
        800, ge=0, description="samples after which what David said counts half; 0 keeps the latest batch only"
    )
    placebo_seed: int = Field(0, description="seed of the permutation of the blocks")

    @model_validator(mode="after")
    def _check_bounds(self) -> "FusionConfig":
        lowest, highest = self.bounds
        if not 0 <= lowest <= highest:
            raise ValueError(f"bounds {lowest} {highest} should rise from a number not below 0")
        return self


@dataclass(frozen=True)
class RawAssessment:
    """What David says of each block; the first three lie in [0, 1], the last two are the original's raw quantities."""

    timestep_error: PerBlock
    pattern_error: PerBlock
    coherence: PerBlock
    cross_entropy: PerBlock
    entropy: PerBlock

    @classmethod
    def zero_error(cls, w: PerBlock) -> "RawAssessment":
        """What he says when the student's features are the teacher's."""
        nothing, all_of_it = torch.zeros_like(w), torch.ones_like(w)
        return cls(nothing, nothing, all_of_it, nothing, nothing)


@dataclass(frozen=True)
class FormulaParameters:
    """What a formula knows besides; everything in the order of the blocks."""

    config: FusionConfig
    w: PerBlock
    cantor_alphas: PerBlock
    """what the seed formula takes for coherence: a parameter of the assessor, no function of the features"""
    permutation: Int[Tensor, " n_blocks"]
    """the block whose place each block takes in the placebo"""
    references: tuple[PerBlock, ...] | None
    """responses of e_t, e_p and 1 - coherence to noise of half a deviation"""


def seed_formula(w: Tensor, e_t: Tensor, e_p: Tensor, coherence: Tensor, config: FusionConfig) -> Tensor:
    """lambda_b = clip(w_b (1 + alpha e_t + beta e_p + delta (1 - coherence)), bounds)   (david.md 4.1)."""
    emphasis = 1 + config.alpha * e_t + config.beta * e_p + config.delta * (1 - coherence)
    return (w * emphasis).clamp(*config.bounds)


def _absolute(assessment: RawAssessment, parameters: FormulaParameters) -> Tensor:
    return seed_formula(
        parameters.w, assessment.timestep_error, assessment.pattern_error, assessment.coherence, parameters.config
    )


def _relative(assessment: RawAssessment, parameters: FormulaParameters) -> Tensor:
    if parameters.references is None:
        raise Refused(
            f"fusion.formula = {parameters.config.formula}: this David brings no reference response - choose absolute"
        )
    errors = (assessment.timestep_error, assessment.pattern_error, 1 - assessment.coherence)
    e_t, e_p, lost = (e / (e + e_ref) for e, e_ref in zip(errors, parameters.references, strict=True))
    return seed_formula(parameters.w, e_t, e_p, 1 - lost, parameters.config)


def _mean_kept(assessment: RawAssessment, parameters: FormulaParameters) -> Tensor:
    """David shifts emphasis and not the learning rate; scaled last, so the bounds hold before the scaling."""
    free = _relative(assessment, parameters)
    return free * (parameters.w.mean() / free.mean())


def _softmax(assessment: RawAssessment, parameters: FormulaParameters) -> Tensor:
    """w_b n softmax_b(emphasis): blocks compete, and equally wrong ones count w_b however wrong they are."""
    risen = (_relative(assessment, parameters) / parameters.w - 1).exp()
    return (parameters.w * risen / risen.mean()).clamp(*parameters.config.bounds)


def _seed(assessment: RawAssessment, parameters: FormulaParameters) -> Tensor:
    return seed_formula(
        parameters.w, assessment.cross_entropy, assessment.entropy, parameters.cantor_alphas, parameters.config
    )


def _permuted(assessment: RawAssessment, parameters: FormulaParameters) -> Tensor:
    """Each block keeps its w_b and gets another's emphasis, so that only the information is lost."""
    emphasis = _relative(assessment, parameters) / parameters.w
    return (parameters.w * emphasis[parameters.permutation]).clamp(*parameters.config.bounds)


Formula: TypeAlias = Callable[[RawAssessment, FormulaParameters], Tensor]
FORMULAS: Mapping[str, Formula] = {
    "static": lambda _said, known: known.w,
    "uniform": lambda _said, known: known.w.mean().expand_as(known.w),
    "absolute": _absolute,
    "relative": _relative,
    "mean_kept": _mean_kept,
    "softmax": _softmax,
    "seed": _seed,
    "permuted": _permuted,
}


def compute_lambdas(assessment: RawAssessment, parameters: FormulaParameters) -> PerBlock:
    """The weight of each block's loss by the configured formula."""
    return FORMULAS[parameters.config.formula](assessment, parameters)
