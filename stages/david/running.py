"""Running means of David's assessments, the lambdas that follow from them, and how much those lambdas vary."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.david.assessment import Assessment, BlockAssessment
from stages.david.fusion import FormulaParameters, FusionConfig, PerBlock, compute_lambdas
from stages.system.refusal import Refused

REFERENCE_FLOOR = 1e-3
"""Least reference response: smaller ones are rounding: the assessor does not respond there."""
BLOCK_QUANTITIES = 5
CONSTANT_BELOW = 0.02
SHUFFLE_STRIDE = 1_000_003
"""Between the first seeds of two placebos, more than the half-lives of a run."""


class RunningAssessment:
    """Exponential means of each block's assessment, with a half-life in samples, and the lambdas that follow.

    A block without any observation counts as faultless.
    """

    def __init__(
        self,
        config: FusionConfig,
        block_weights: Mapping[str, float],
        bins: int,
        references: Float[Tensor, "n_blocks 3"] | None = None,
        cantor_alphas: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`block_weights` is w_b, in the order of all vectors; `references` are e_t, e_p and 1 - coherence of the
        teacher's own features under noise of half a deviation.

        Raises `Refused` when the formula needs references and there are none.
        """
        self.config, self.blocks, self.device = config, tuple(block_weights), torch.device(device)
        self._max_nats = math.log(bins)
        self._active = [i for i, w in enumerate(block_weights.values()) if w > 0]
        alphas = dict.fromkeys(self.blocks, config.seed_coherence) if cantor_alphas is None else cantor_alphas
        self.formula_parameters = FormulaParameters(
            config,
            self._vector(block_weights),
            self._vector({block: alphas[block] for block in self.blocks}),
            self._permutation(0),
            None if references is None else references.to(device).clamp_min(REFERENCE_FLOOR),
        )
        self.baseline_lambdas: PerBlock = compute_lambdas(
            Assessment.zero_error(self.formula_parameters.w), self.formula_parameters
        )
        """the lambdas of a faultless student: w_b, unless the formula is uniform or original"""
        self._samples = 0
        self._sums = torch.zeros(len(self.blocks), BLOCK_QUANTITIES, device=device)
        self._weight_sums = torch.zeros(len(self.blocks), device=device)

    @property
    def is_warmed_up(self) -> bool:
        """Whether the warm-up is over."""
        return self._samples >= self.config.warmup_samples

    def lambdas(self) -> PerBlock:
        """Lambda from all updates so far; within the warm-up drawn towards that of a faultless student."""
        warmup = self.config.warmup_samples
        share = min(1.0, self._samples / warmup) if warmup else 1.0
        parameters = self.formula_parameters
        if self.config.formula == "shuffled":
            parameters = replace(parameters, permutation=self._permutation(self._samples))
        return torch.lerp(self.baseline_lambdas, compute_lambdas(self.assessment(), parameters), share)

    def observe(
        self,
        assessed: Mapping[str, BlockAssessment],
        importance_weight: Float[Tensor, " b"] | None = None,
        reliable: Mapping[str, Bool[Tensor, " b"]] | None = None,
    ) -> Float[Tensor, "n_blocks quantities+1"]:
        """Weighted sums over some samples, and the sums of their weights; these add up over the parts of a batch.

        A sample that is not `reliable` in a block has the weight 0 there.
        """
        quantities = torch.stack([_block_quantities(assessed[block]) for block in self.blocks]).to(self._sums)
        weights = torch.ones(len(self.blocks), quantities.shape[2], device=self.device)
        if reliable is not None:
            weights = weights * torch.stack([reliable[block] for block in self.blocks])
        if importance_weight is not None:
            weights = weights * importance_weight
        return torch.cat([(quantities * weights[:, None]).sum(dim=2), weights.sum(dim=1, keepdim=True)], dim=1)

    def update(self, sums: Float[Tensor, "n_blocks quantities+1"], samples: int) -> None:
        """Take in what was observed of so many samples."""
        half_life = self.config.half_life_samples
        kept = 2.0 ** (-samples / half_life) if half_life else 0.0
        self._sums = kept * self._sums + sums[:, :BLOCK_QUANTITIES]
        self._weight_sums = kept * self._weight_sums + sums[:, BLOCK_QUANTITIES]
        self._samples += samples

    def assessment(self) -> Assessment:
        """The present means; negative excess is cut off after averaging, because noise has a positive part."""
        means = torch.where(self._weight_sums > 0, self._sums.T / self._weight_sums, 0.0)
        excess, divergence, lost, cross_entropy, entropy = means
        return Assessment((excess / self._max_nats).clamp(0, 1), divergence, 1 - lost, cross_entropy, entropy)

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"samples": self._samples, "sums": self._sums.clone(), "heard": self._weight_sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        if state["sums"].shape != self._sums.shape:
            raise Refused(f"David's state has {len(state['sums'])} blocks, this student has {len(self.blocks)}")
        self._samples = int(state["samples"])
        self._sums = state["sums"].to(self._sums, copy=True)
        self._weight_sums = state["heard"].to(self._weight_sums, copy=True)

    def _permutation(self, samples: int) -> Int[Tensor, " n_blocks"]:
        """The placebo's after so many samples; that of `shuffled` is another one in each half-life.

        Blocks of weight 0 stay where they are: they are not judged, and would give another one an emphasis that no
        block has.
        """
        seed, half_life = self.config.placebo_seed, max(1, self.config.half_life_samples)
        if self.config.formula == "shuffled":
            seed = SHUFFLE_STRIDE * seed + samples // half_life
        active, permutation = torch.tensor(self._active, dtype=torch.long), torch.arange(len(self.blocks))
        permutation[active] = active[_random_cycle(len(active), seed)]
        return permutation.to(self.device)

    def _vector(self, values: Mapping[str, float]) -> PerBlock:
        return torch.tensor(list(values.values()), dtype=torch.float32, device=self.device)


def _block_quantities(assessment: BlockAssessment) -> Float[Tensor, "quantities b"]:
    """With 1 - coherence instead of coherence: a sum of zeros is exact."""
    a = assessment
    return torch.stack([a.excess, a.divergence, 1 - a.coherence, a.cross_entropy, a.entropy])


def _random_cycle(n: int, seed: int) -> Tensor:
    """A permutation of n things that is a single random cycle, so that nothing stays in its place."""
    cycle = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return other


def coefficient_of_variation(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over mean along a dimension; a pure number."""
    return values.std(dim=dim, correction=0) / values.mean(dim=dim)


@dataclass(frozen=True)
class LambdaVariation:
    """How much lambda varies because of David, over the blocks and over time."""

    over_blocks: float
    over_time: float

    @property
    def is_constant(self) -> bool:
        """Whether the run was one with static weights."""
        return max(self.over_blocks, self.over_time) < CONSTANT_BELOW

    def summary(self) -> str:
        """One line for the user."""
        varied = f"lambda varied by {self.over_blocks:.1%} over the blocks and {self.over_time:.1%} over time"
        return f"David had no effect: {varied}, as with static weights" if self.is_constant else f"David: {varied}"


class LambdaMoments:
    """Running moments of each block's lambda over that of a faultless student; blocks of weight 0 do not count."""

    def __init__(self, baseline: PerBlock) -> None:
        self._baseline, self._active, self._steps = baseline.double(), baseline > 0, 0
        self._sums = torch.zeros(2, len(baseline), dtype=torch.float64, device=baseline.device)

    def update(self, lambdas: PerBlock) -> None:
        """Count the lambdas of one step in."""
        emphasis = torch.where(self._active, lambdas.double() / self._baseline, 1.0)
        self._sums = self._sums + torch.stack([emphasis, emphasis.square()])
        self._steps += 1

    def variation(self) -> LambdaVariation | None:
        """How much the lambdas varied so far; None before the first step.

        w_b, which varies over the blocks without David, is divided out.
        """
        if not self._steps:
            return None
        mean, square = self._sums[:, self._active] / self._steps
        over_time = (square - mean.square()).clamp_min(0).sqrt() / mean
        return LambdaVariation(float(coefficient_of_variation(mean, 0)), float(over_time.mean()))

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"steps": self._steps, "sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._steps = int(state["steps"])
        self._sums = state["sums"].to(self._sums, copy=True)
