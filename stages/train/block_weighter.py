"""Block weighters: static weights, or David, which assesses every batch and weighs blocks and samples by it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.values import Strict
from shards.batch import Batch
from shards.manifest import Manifest
from shards.reader import Reader
from stages.david.assessment import Assessor, assess, bins_of
from stages.david.assessor import FittedAssessor
from stages.david.block_model import FitConfig
from stages.david.difficulty_profile import DifficultyProfile
from stages.david.fusion import FusionConfig
from stages.david.published import PublishedAssessor
from stages.david.running import LambdaMoments, LambdaVariation, RunningAssessment
from stages.david.saved_assessor import load_or_fit
from stages.david.times import SamplingConfig, SizeStream, TimestepSampler
from stages.nets.student import Prediction

DAVID_FOLDER = "david"
CONSTANT_FORMULAS = ("static", "uniform")
"""Formulas that need no assessment: nothing is fitted for them."""


class BlockWeighter:
    """Constant lambdas, and the base of what weighs blocks and samples by observation.

    The lambdas of a step rest on the steps before it: a step's micro-batches are observed on all processes, and the sum
    of the observations updates every process alike. All calls are made under no_grad.
    """

    timestep_sampler: TimestepSampler | None = None
    """the order of the batches, where it follows from the observations"""

    def __init__(self, lambdas: Float[Tensor, " n_blocks"] | None = None) -> None:
        self._lambdas = torch.ones(0) if lambdas is None else lambdas

    def lambdas(self) -> Float[Tensor, " n_blocks"]:
        """The weight of each block's loss."""
        return self._lambdas

    def importance_weight(self, batch: Batch) -> Float[Tensor, " b"]:
        """The weight of each sample, not normalised inside the batch."""
        return torch.ones_like(batch.s)

    def observe(self, _batch: Batch, _output: Prediction, _importance_weight: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """Observations of a micro-batch, as tensors that add up over micro-batches and processes."""
        return ()

    def update(self, observations: Sequence[Tensor], samples: int) -> None:
        """Take in the sums over a whole step of so many samples."""

    def metrics(self) -> Mapping[str, Any]:
        """For the journal: names, and numbers or mappings of numbers."""
        return {}

    def summary(self) -> str:
        """One line for the end of a run."""
        return "David is not used: the lambdas are those of the configuration"

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes, for the checkpoint: tensors and plain numbers."""
        return {}

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""


class DavidConfig(Strict):
    """Which assessor reads the student's features, and how its assessment weighs blocks and times."""

    published: Path | None = Field(
        None, description="folder of a published GeoDavidCollective; none fits a David to this cache, in RUN/distill"
    )
    fit: FitConfig = FitConfig()
    fusion: FusionConfig = FusionConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def affects_training(self) -> bool:
        """Whether anything depends on an assessment."""
        return self.fusion.formula not in CONSTANT_FORMULAS or self.sampling.scheme != "stored"


class DavidWeighter(BlockWeighter):
    """David's lambdas, and pi / q where a timestep sampler chooses the times by David's profile."""

    def __init__(
        self, assessor: Assessor, running_assessment: RunningAssessment, timestep_sampler: TimestepSampler | None
    ) -> None:
        self.assessor, self.running_assessment = assessor, running_assessment
        self.timestep_sampler = timestep_sampler
        self.lambda_moments = LambdaMoments(running_assessment.baseline_lambdas)

    def lambdas(self) -> Float[Tensor, " n_blocks"]:
        """Those of the running assessment."""
        return self.running_assessment.lambdas()

    def importance_weight(self, batch: Batch) -> Float[Tensor, " b"]:
        """pi / q of each sample where the times are chosen, else 1."""
        if self.timestep_sampler is None:
            return torch.ones_like(batch.s)
        return self.timestep_sampler.importance_weight(batch.k, batch.size)

    def observe(self, batch: Batch, output: Prediction, importance_weight: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """Sums for the running assessment; where the times are chosen, also those for the profile of the bins."""
        bins, david = bins_of(batch.k, self.assessor), self.assessor
        student, teacher = ({b: of[b].float() for b in david.blocks} for of in (output.features, batch.features))
        assessed = assess(david, student, teacher, bins)
        reliable = None
        if isinstance(david, FittedAssessor):
            reliable = {block: david.is_reliable(block, bins) for block in david.blocks}
        if not self.timestep_sampler:
            return (self.running_assessment.observe(assessed, None, reliable),)
        return (
            self.running_assessment.observe(assessed, importance_weight, reliable),
            self.timestep_sampler.profile.observe(bins, assessed),
        )

    def update(self, observations: Sequence[Tensor], samples: int) -> None:
        """Take in the sums over a step, whose lambdas were those from before it."""
        if self.running_assessment.is_warmed_up:
            self.lambda_moments.update(self.running_assessment.lambdas())
        self.running_assessment.update(observations[0], samples)
        if self.timestep_sampler:
            self.timestep_sampler.profile.update(observations[1], samples)

    def metrics(self) -> dict[str, Any]:
        """The present assessment of each block, the variation of lambda, and the effective samples per sample."""
        assessment = self.running_assessment.assessment()
        line: dict[str, Any] = {
            name: dict(zip(self.assessor.blocks, getattr(assessment, name).tolist(), strict=True))
            for name in ("timestep_error", "pattern_error", "coherence")
        }
        variation = self.lambda_variation()
        line["lambda_variation"] = vars(variation) if variation else {}
        if self.timestep_sampler:
            line["effective_share"] = self.timestep_sampler.effective_share()
        return line

    def lambda_variation(self) -> LambdaVariation | None:
        """How much lambda varied because of David, over the blocks whose loss counts; None within the warm-up."""
        return self.lambda_moments.variation()

    def summary(self) -> str:
        """Whether David had an effect."""
        variation = self.lambda_variation()
        return variation.summary() if variation else "David had no effect: the run ended within fusion.warmup_samples"

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        state = {"voice": self.running_assessment.state_dict(), "emphasis": self.lambda_moments.state_dict()}
        return state | ({"choice": self.timestep_sampler.state_dict()} if self.timestep_sampler else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.running_assessment.load_state_dict(state["voice"])
        self.lambda_moments.load_state_dict(state["emphasis"])
        if self.timestep_sampler:
            self.timestep_sampler.load_state_dict(state["choice"])


def make_running_assessment(
    assessor: Assessor, fusion: FusionConfig, block_weights: Mapping[str, float], device: torch.device
) -> RunningAssessment:
    """The running assessment, with the references or the alphas of this assessor; `block_weights` is w_b."""
    weights = {block: block_weights[block] for block in assessor.blocks}
    references = assessor.references() if isinstance(assessor, FittedAssessor) else None
    alphas = assessor.cantor_alphas if isinstance(assessor, PublishedAssessor) else None
    return RunningAssessment(fusion, weights, assessor.bins, references, alphas, device)


def load_or_fit_assessor(
    config: DavidConfig, cache: Path, folder: Path, device: torch.device, steps: int, blocks: Collection[str]
) -> Assessor:
    """Published weights, or the David in `folder`, fitted to this cache first where there is none.

    `steps` are those of the cache's teacher, `blocks` those of the student, which may lack some of the cache's.
    """
    if config.published is None:
        return load_or_fit(folder / DAVID_FOLDER, cache, config.fit, steps, blocks).to(device)
    made_by: Any = Manifest.open(cache).recipe.identity
    hook_point, widths = made_by["hook_point"], made_by["blocks"]
    return PublishedAssessor.open(config.published, hook_point, widths, steps, "in_bin", device, blocks)


def make_block_weighter(
    config: DavidConfig,
    reader: Reader,
    block_weights: Mapping[str, float],
    folder: Path,
    device: torch.device,
    steps: int,
) -> BlockWeighter:
    """David, or constant lambdas where nothing depends on an assessment.

    `block_weights` is w_b in the order of the student's blocks, `folder` that of the run, `steps` are the teacher's.
    """
    if not config.affects_training:
        return BlockWeighter(RunningAssessment(config.fusion, block_weights, bins=2, device=device).baseline_lambdas)
    assessor = load_or_fit_assessor(config, reader.folder, folder, device, steps, tuple(block_weights))
    running_assessment = make_running_assessment(assessor, config.fusion, block_weights, device)
    if config.sampling.scheme == "stored":
        return DavidWeighter(assessor, running_assessment, None)
    profile = DifficultyProfile(config.fusion, assessor.bins, config.sampling.profile_samples, device)
    by_size = zip(reader.sizes, reader.seeds, reader.pairs_of_sizes, reader.timesteps_of_sizes, strict=True)
    sampler = TimestepSampler(
        config.sampling, profile, [SizeStream(*given) for given in by_size], reader.schedule, steps
    )
    return DavidWeighter(assessor, running_assessment, sampler)
