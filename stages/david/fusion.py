"""The fusion formulas: from David's assessment to lambda_b, the weight of each block's loss."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from configs.values import Range, Strict
from stages.david.assessment import Assessment
from stages.system.refusal import Refused

PUBLISHED_BLOCK_WEIGHTS = {"down_0": 0.7, "down_1": 0.9, "down_2": 1.0, "down_3": 1.1, "mid": 1.2}
PUBLISHED_BLOCK_WEIGHTS |= {"up_0": 1.1, "up_1": 1.0, "up_2": 0.9, "up_3": 0.7}
"""The original's w_b (david.md 4.1)."""

PerBlock: TypeAlias = Float[Tensor, " n_blocks"]


class FusionConfig(Strict):
    """lambda_b = clip(w_b (1 + alpha e_t + beta e_p + delta (1 - coherence)), bounds), or an alternative formula.

    w_b is `objective.block_weights`; lambda_b is 0 where w_b is.
    """

    formula: Literal[
        "static", "uniform", "absolute", "relative", "mean_kept", "softmax", "original", "permuted", "shuffled"
    ] = Field(
        "relative",
        description="static: w_b; uniform: their mean; absolute: the formula on numbers in [0, 1]; relative: on "
        "e / (e + e_ref), e_ref the response to noise of half a deviation; mean_kept: relative, the mean of lambda "
        "held at that of w_b; softmax: relative's emphasis as a softmax over the blocks; original: on "
        "cross-entropy in nats, entropy and alpha, as the original meant it (it saturates); permuted: relative, on "
        "the assessments of other blocks that count (a placebo); shuffled: permuted, anew in each half-life",
    )
    alpha: float = Field(0.5, ge=0, description="weight of the timestep error")
    beta: float = Field(0.25, ge=0, description="weight of the pattern error")
    delta: float = Field(0.25, ge=0, description="weight of lost coherence")
    bounds: Range = Field((0.5, 3.0), description="lowest and highest lambda of the formula")
    seed_coherence: float = Field(
        0.5, description="coherence in the formula `original` where David has no alpha: the initial value of alpha"
    )
    warmup_samples: int = Field(3200, ge=0, description="samples over which lambda goes from w_b to David's")
    half_life_samples: int = Field(
        800, ge=0, description="samples after which an assessment counts half; 0 keeps the latest batch only"
    )
    placebo_seed: int = Field(0, description="seed of the permutations of the blocks")

    @field_validator("formula", mode="before")
    @classmethod
    def _current_formula(cls, formula: Any) -> Any:
        return current_formula(formula)

    @model_validator(mode="before")
    @classmethod
    def _refuse_second_weights(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "block_weights" in values:
            raise ValueError("block_weights is no option any more - set w_b in objective.block_weights")
        return values


def current_formula(formula: Any) -> Any:
    """The name of a formula in this version: `original` was `seed` before, in users' YAML and in stored runs."""
    return "original" if formula == "seed" else formula


def translate_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings of a distillation (its identity, or its section of config.yaml) as this version names them.

    Earlier versions had two factors of w_b, `david.fusion.block_weights` and `objective.block_weights`.
    """
    translated = deepcopy(dict(settings))
    match translated:
        case {"david": {"fusion": dict(fusion)}, "objective": dict(objective)}:
            if "formula" in fusion:
                fusion["formula"] = current_formula(fusion["formula"])
            match fusion.pop("block_weights", None), objective.get("block_weights"):
                case dict(weights), dict(factors):
                    changed = {name: w for name, w in weights.items() if w != PUBLISHED_BLOCK_WEIGHTS.get(name, 1.0)}
                    scaled = {name: factor * weights.get(name, 1.0) for name, factor in factors.items()}
                    objective["block_weights"] = changed | scaled
            translated["david"]["fusion"], translated["objective"] = fusion, objective
    return translated


@dataclass(frozen=True)
class FormulaParameters:
    """Constants of a formula, in the order of the blocks."""

    config: FusionConfig
    w: PerBlock
    cantor_alphas: PerBlock
    """coherence in the formula `original`: a parameter of the assessor, no function of the features"""
    permutation: Int[Tensor, " n_blocks"]
    """the block whose emphasis each block takes in the placebo"""
    references: Float[Tensor, "n_blocks 3"] | None
    """responses of e_t, e_p and 1 - coherence to noise of half a deviation"""


def compute_lambdas(assessment: Assessment, parameters: FormulaParameters) -> PerBlock:
    """The weight of each block's loss by the configured formula; 0 where w_b is."""
    return torch.where(parameters.w > 0, FORMULAS[parameters.config.formula](assessment, parameters), 0.0)


def emphasis(e_t: Tensor, e_p: Tensor, coherence: Tensor, config: FusionConfig) -> Tensor:
    """1 + alpha e_t + beta e_p + delta (1 - coherence)   (david.md 4.1)."""
    return 1 + config.alpha * e_t + config.beta * e_p + config.delta * (1 - coherence)


def _relative_emphasis(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    if parameters.references is None:
        raise Refused(
            f"fusion.formula = {parameters.config.formula}: this David brings no reference response - choose absolute"
        )
    errors = (assessment.timestep_error, assessment.pattern_error, 1 - assessment.coherence)
    e_t, e_p, lost = (e / (e + e_ref) for e, e_ref in zip(errors, parameters.references.unbind(1), strict=True))
    return emphasis(e_t, e_p, 1 - lost, parameters.config)


def _clip(lambdas: Tensor, parameters: FormulaParameters) -> Tensor:
    return lambdas.clamp(*parameters.config.bounds)


def _uniform(_assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    w = parameters.w
    return w[w > 0].mean().expand_as(w)


def _absolute(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    e_t, e_p, coherence = assessment.timestep_error, assessment.pattern_error, assessment.coherence
    return _clip(parameters.w * emphasis(e_t, e_p, coherence, parameters.config), parameters)


def _relative(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    return _clip(parameters.w * _relative_emphasis(assessment, parameters), parameters)


def _mean_kept(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    """The mean over the blocks stays that of w: emphasis without a change of learning rate; bounds hold before."""
    free, active = _relative(assessment, parameters), parameters.w > 0
    return free * (parameters.w[active].mean() / free[active].mean())


def _softmax(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    """w_b n softmax_b(emphasis): blocks compete, and equally wrong ones count w_b however wrong they are."""
    risen = (_relative_emphasis(assessment, parameters) - 1).exp()
    return _clip(parameters.w * risen / risen[parameters.w > 0].mean(), parameters)


def _original(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    quantities = (assessment.cross_entropy, assessment.entropy, parameters.cantor_alphas)
    return _clip(parameters.w * emphasis(*quantities, parameters.config), parameters)


def _permuted(assessment: Assessment, parameters: FormulaParameters) -> Tensor:
    """Each block keeps its w_b and gets another's emphasis, so that only the information is lost."""
    return _clip(parameters.w * _relative_emphasis(assessment, parameters)[parameters.permutation], parameters)


PLACEBOS = ("permuted", "shuffled")
FORMULAS: Mapping[str, Callable[[Assessment, FormulaParameters], Tensor]] = {
    "static": lambda _assessment, parameters: parameters.w,
    "uniform": _uniform,
    "absolute": _absolute,
    "relative": _relative,
    "mean_kept": _mean_kept,
    "softmax": _softmax,
    "original": _original,
    "permuted": _permuted,
    "shuffled": _permuted,
}
