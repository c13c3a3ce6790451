"""Whether David was heard: how much lambda varied because of him.

David's voice in the loss: what he said lately, and the lambdas that follow.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stages.david.assessment import Assessment, BlockAssessment
from stages.david.fusion import (
    DEFAULT_BLOCK_WEIGHTS,
    FormulaParameters,
    FusionConfig,
    PerBlock,
    RawAssessment,
    compute_lambdas,
)
from stages.system.refusal import Refused, did_you_mean

CONSTANT_BELOW = 0.02


def coefficient_of_variation(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over mean along a dimension; a pure number."""
    return values.std(dim=dim, correction=0) / values.mean(dim=dim)


@dataclass(frozen=True)
class LambdaVariation:
    """How much lambda varies because of David, over the blocks and over time."""

    over_blocks: float
    over_time: float

    @classmethod
    def from_moments(cls, mean: Float[Tensor, " n_blocks"], square: Float[Tensor, " n_blocks"]) -> "LambdaVariation":
        """From the mean and the mean square over time of each block's lambda over that of a faultless student.

        w_b varies over the blocks without David, and is no voice.
        """
        over_time = (square - mean.square()).clamp_min(0).sqrt() / mean
        return cls(float(coefficient_of_variation(mean, 0)), float(over_time.mean()))

    @property
    def is_constant(self) -> bool:
        """Whether the run was one with static weights."""
        return max(self.over_blocks, self.over_time) < CONSTANT_BELOW

    def summary(self) -> str:
        """One line for the user."""
        said = f"lambda varied by {self.over_blocks:.1%} over the blocks and {self.over_time:.1%} over time"
        return f"David was silent: {said}, as static weights do" if self.is_constant else f"David spoke: {said}"


class LambdaMoments:
    """Running moments of each block's lambda over that of a faultless student."""

    def __init__(self, baseline: PerBlock) -> None:
        self._baseline, self._steps = baseline.double(), 0
        self._sums = torch.zeros(2, len(baseline), dtype=torch.float64, device=baseline.device)

    def update(self, lambdas: PerBlock) -> None:
        """Count the lambdas of one step in."""
        emphasis = lambdas.double() / self._baseline
        self._sums = self._sums + torch.stack([emphasis, emphasis.square()])
        self._steps += 1

    def variation(self, block_mask: Bool[Tensor, " n_blocks"]) -> LambdaVariation | None:
        """How much the lambdas of these blocks varied so far; None before the first step.

        What is said of a block whose loss has weight 0 is no voice.
        """
        return LambdaVariation.from_moments(*(self._sums[:, block_mask] / self._steps)) if self._steps else None

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"steps": self._steps, "sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self._steps = int(state["steps"])
        self._sums = state["sums"].to(self._sums, copy=True)


REFERENCE_FLOOR = 1e-3
"""A reference response below this says that David does not see there; numbers of its size are rounding."""
BLOCK_QUANTITIES = 5


def refuse_unknown_blocks(config: FusionConfig, blocks: tuple[str, ...]) -> None:
    """Raise `Refused` for the weight of a block that is not there."""
    for name in config.block_weights:
        if name not in blocks and name not in DEFAULT_BLOCK_WEIGHTS:
            raise Refused(f"fusion.block_weights.{name}: no such block - {did_you_mean(name, blocks)}")


class RunningAssessment:
    """Running means of what David says of each block, with a memory counted in samples, and lambda from them.

    A block of which nothing was heard yet counts as faultless.
    """

    def __init__(
        self,
        config: FusionConfig,
        blocks: tuple[str, ...],
        bins: int,
        reference: Assessment | None = None,
        cantor_alphas: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`reference` is the response to noise of half a deviation on the teacher's own features, as the fit found it.

        Raises `Refused` when the formula needs a reference and there is none, or for a weight of an unknown block.
        """
        refuse_unknown_blocks(config, blocks)
        self.config, self.blocks, self.device = config, blocks, torch.device(device)
        self._max_nats = math.log(bins)
        cantor_alphas = dict.fromkeys(blocks, config.seed_coherence) if cantor_alphas is None else cantor_alphas
        self.formula_parameters = FormulaParameters(
            config,
            self._vector([config.block_weights.get(block, 1.0) for block in blocks]),
            self._vector([cantor_alphas[block] for block in blocks]),
            _random_cycle(len(blocks), config.placebo_seed).to(device),
            None if reference is None else self._reference_vectors(reference),
        )
        self.baseline_lambdas: PerBlock = compute_lambdas(
            RawAssessment.zero_error(self.formula_parameters.w), self.formula_parameters
        )
        """the lambdas of a faultless student: w_b, unless the formula is uniform or the seed's"""
        self._samples = 0
        self._sums = torch.zeros(len(blocks), BLOCK_QUANTITIES, device=device)
        self._vote_sums = torch.zeros(len(blocks), device=device)

    @property
    def is_warmed_up(self) -> bool:
        """Whether the warm-up is over."""
        return self._samples >= self.config.warmup_samples

    def lambdas(self) -> PerBlock:
        """Lambda from all that was learnt so far, at first drawn towards that of a faultless student."""
        warmup = self.config.warmup_samples
        share = min(1.0, self._samples / warmup) if warmup else 1.0
        return torch.lerp(self.baseline_lambdas, compute_lambdas(self.raw_assessment(), self.formula_parameters), share)

    def observe(
        self,
        assessed: Mapping[str, BlockAssessment],
        importance_weight: Float[Tensor, " b"] | None = None,
        reliable: Mapping[str, Bool[Tensor, " b"]] | None = None,
    ) -> Float[Tensor, "n_blocks READINGS+1"]:
        """Sums of what David says of some samples, and of their votes; sums of all parts of a batch are learnt from.

        `omega` weighs samples whose times were chosen; a sample that he cannot judge in a block has no vote there.
        """
        readings = torch.stack([_block_quantities(assessed[block]) for block in self.blocks]).to(self._sums)
        votes = torch.ones(len(self.blocks), readings.shape[2], device=self.device)
        if reliable is not None:
            votes = votes * torch.stack([reliable[block] for block in self.blocks])
        if importance_weight is not None:
            votes = votes * importance_weight
        return torch.cat([(readings * votes[:, None]).sum(dim=2), votes.sum(dim=1, keepdim=True)], dim=1)

    def update(self, sums: Float[Tensor, "n_blocks READINGS+1"], samples: int) -> None:
        """Take in what was heard of so many samples."""
        half_life = self.config.half_life_samples
        kept = 2.0 ** (-samples / half_life) if half_life else 0.0
        self._sums = kept * self._sums + sums[:, :BLOCK_QUANTITIES]
        self._vote_sums = kept * self._vote_sums + sums[:, BLOCK_QUANTITIES]
        self._samples += samples

    def raw_assessment(self) -> RawAssessment:
        """What David says at present; averaged before negative excess is cut off, because noise has a positive part."""
        means = torch.where(self._vote_sums > 0, self._sums.T / self._vote_sums, 0.0)
        excess, divergence, lost, cross_entropy, entropy = means
        return RawAssessment((excess / self._max_nats).clamp(0, 1), divergence, 1 - lost, cross_entropy, entropy)

    def assessment(self) -> Assessment:
        """The three numbers at present, by the names of the blocks."""
        said = self.raw_assessment()
        each = (said.timestep_error, said.pattern_error, said.coherence)
        return Assessment(*(dict(zip(self.blocks, numbers, strict=True)) for numbers in each))

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"samples": self._samples, "sums": self._sums.clone(), "heard": self._vote_sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        if state["sums"].shape != self._sums.shape:
            raise Refused(f"David's state speaks of {len(state['sums'])} blocks, this student has {len(self.blocks)}")
        self._samples = int(state["samples"])
        self._sums, self._vote_sums = (
            state["sums"].to(self._sums, copy=True),
            state["heard"].to(self._vote_sums, copy=True),
        )

    def _vector(self, values: list[float]) -> PerBlock:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _reference_vectors(self, reference: Assessment) -> tuple[PerBlock, ...]:
        responses = (
            [float(reference.timestep_error[block]) for block in self.blocks],
            [float(reference.pattern_error[block]) for block in self.blocks],
            [1 - float(reference.coherence[block]) for block in self.blocks],
        )
        return tuple(self._vector(response).clamp_min(REFERENCE_FLOOR) for response in responses)


def _block_quantities(assessment: BlockAssessment) -> Float[Tensor, "READINGS b"]:
    """Lost coherence instead of coherence: a sum of zeros is exact."""
    return torch.stack(
        [
            assessment.excess,
            assessment.divergence,
            1 - assessment.coherence,
            assessment.cross_entropy,
            assessment.entropy,
        ]
    )


def _random_cycle(n: int, seed: int) -> Tensor:
    """For each of n things another one: a single random cycle, so that nothing stays where it is."""
    cycle = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return other
