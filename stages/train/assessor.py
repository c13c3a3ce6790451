"""Who decides, step by step, how much each block and each sample counts.

David in the loop: he hears what student and teacher say of each batch, and decides how much each block counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.values import Strict
from shards.batch import Batch
from shards.manifest import Manifest
from shards.reader import Reader
from stages.david.assessment import Assessment, Assessor, Posterior, assess_block, bins_of, soft_targets
from stages.david.assessor import FittedAssessor
from stages.david.block_model import FitConfig
from stages.david.fusion import FusionConfig
from stages.david.published import PublishedAssessor
from stages.david.running import LambdaMoments, LambdaVariation, RunningAssessment, refuse_unknown_blocks
from stages.david.saved import load_or_fit, save
from stages.david.times import DifficultyProfile, SamplingConfig, TimestepSampler, bin_accuracy
from stages.nets.student import Prediction


class BlockWeighter(Protocol):
    """Asked at every step, within the step's no_grad; what he remembers goes into the checkpoint.

    What he says at a step rests on the steps before it: he hears a step's micro-batches on all processes before he
    learns from their sum, so that all processes hold the same judge.
    """

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """One weight for each block; `static` are those of the configuration."""
        ...

    def importance_weight(self, batch: Batch) -> Float[Tensor, " b"]:
        """The weight of each sample, not normalised inside the batch."""
        ...

    def observe(self, batch: Batch, output: Prediction, importance_weight: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """What he hears in a micro-batch, as tensors that add up over micro-batches and processes."""
        ...

    def update(self, observations: Sequence[Tensor], samples: int) -> None:
        """Take in the sums over a whole step of so many samples."""
        ...

    def metrics(self) -> Mapping[str, Any]:
        """What he has to say to the journal: names, and numbers or mappings of numbers."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes in him: tensors and plain numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        ...


class StaticWeights:
    """Nobody judges: each block counts as configured, and every sample alike."""

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """Those of the configuration."""
        return static

    def importance_weight(self, batch: Batch) -> Float[Tensor, " b"]:
        """One each."""
        return torch.ones_like(batch.s)

    def observe(self, _batch: Batch, _output: Prediction, _importance_weight: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """Nothing."""
        return ()

    def update(self, _observations: Sequence[Tensor], _samples: int) -> None:
        """Nothing is learnt."""

    def metrics(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """Nothing is taken over."""


DAVID_FOLDER = "david"
CONSTANT_FORMULAS = ("static", "uniform")
"""Formulas that do not listen: nobody is fitted for them."""


class DavidConfig(Strict):
    """Who judges the student's features, and what his word is worth."""

    published: Path | None = Field(
        None, description="folder of a published GeoDavidCollective; none fits a David to this cache, in RUN/distill"
    )
    fit: FitConfig = FitConfig()
    fusion: FusionConfig = FusionConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def affects_training(self) -> bool:
        """Whether anything depends on what he says."""
        return self.fusion.formula not in CONSTANT_FORMULAS or self.sampling.scheme != "stored"


class DavidWeighter:
    """The judge of a run of distillation."""

    def __init__(
        self, assessor: Assessor, config: DavidConfig, reader: Reader, seed: int, device: torch.device
    ) -> None:
        self.assessor, self.reader = assessor, reader
        self._fitted = assessor if isinstance(assessor, FittedAssessor) else None
        self.running_assessment = make_running_assessment(assessor, config.fusion, device)
        self.lambda_moments = LambdaMoments(self.running_assessment.baseline_lambdas)
        self._active_blocks = torch.ones(len(assessor.blocks), dtype=torch.bool, device=device)
        self.timestep_sampler: TimestepSampler | None = None
        if config.sampling.scheme != "stored":
            profile = DifficultyProfile(config.fusion, assessor.bins, config.sampling.profile_samples, device)
            rows = reader.batch_size * reader.world
            self.timestep_sampler = TimestepSampler(
                config.sampling, profile, seed, reader.pairs, reader.timesteps, assessor.steps, rows
            )

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """The configuration's weights times what David says."""
        self._active_blocks = static > 0
        return static * self.running_assessment.lambdas()

    def observe(self, batch: Batch, output: Prediction, importance_weight: Float[Tensor, " b"]) -> Sequence[Tensor]:
        """What he says of some samples; where he chooses the times, also what his profile of them sees."""
        bins = bins_of(batch.k, self.assessor)
        target = soft_targets(bins, self.assessor.bins)
        teacher: dict[str, Posterior] = {}
        assessed = {}
        for block in self.assessor.blocks:
            teacher[block] = self.assessor.posterior(block, batch.features[block].float(), bins)
            student = self.assessor.posterior(block, output.features[block].float(), bins)
            assessed[block] = assess_block(student, teacher[block], bins, target)
        reliable = None
        if self._fitted:
            reliable = {block: self._fitted.is_reliable(block, bins) for block in self.assessor.blocks}
        said = self.running_assessment.observe(assessed, importance_weight if self.timestep_sampler else None, reliable)
        return (
            (said, self.timestep_sampler.profile.observe(bins, assessed, bin_accuracy(teacher, bins)))
            if self.timestep_sampler
            else (said,)
        )

    def update(self, observations: Sequence[Tensor], samples: int) -> None:
        """Take in the sums over a step, whose lambdas were those from before it."""
        if self.running_assessment.is_warmed_up:
            self.lambda_moments.update(self.running_assessment.lambdas())
        self.running_assessment.update(observations[0], samples)
        if self.timestep_sampler:
            self.timestep_sampler.profile.update(observations[1], samples)

    def importance_weight(self, batch: Batch) -> Float[Tensor, " b"]:
        """pi / q of each sample where David chooses the times, else 1."""
        return self.timestep_sampler.importance_weight(batch.k) if self.timestep_sampler else torch.ones_like(batch.s)

    def batches(self, start_sample: int) -> Iterator[Batch]:
        """The batches of the run from this sample on: at the times that David chooses, or as the cache holds them."""
        return (
            self.timestep_sampler.batches(start_sample, self.reader.batches)
            if self.timestep_sampler
            else self.reader.batches(start_sample)
        )

    def metrics(self) -> dict[str, Any]:
        """What he says of each block at present, how much lambda varied because of him, and what a sample is worth."""
        said = self.running_assessment.assessment()
        line = {name: _to_floats(getattr(said, name)) for name in ("timestep_error", "pattern_error", "coherence")}
        found = self.lambda_variation()
        varied = {"over_blocks": found.over_blocks, "over_time": found.over_time} if found else {}
        worth = {"effective_share": self.timestep_sampler.effective_share()} if self.timestep_sampler else {}
        return {**line, "lambda_variation": varied, **worth}

    def lambda_variation(self) -> LambdaVariation | None:
        """How much lambda varied because of him, over the blocks whose loss counts; None within the warm-up."""
        return self.lambda_moments.variation(self._active_blocks)

    def summary(self) -> str:
        """Whether he was heard, for the end of a run."""
        found = self.lambda_variation()
        return found.summary() if found else "David was not heard: the run ended within fusion.warmup_samples"

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        state = {"voice": self.running_assessment.state_dict(), "emphasis": self.lambda_moments.state_dict()}
        return state | ({"choice": self.timestep_sampler.state_dict()} if self.timestep_sampler else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self.running_assessment.load_state_dict(state["voice"])
        self.lambda_moments.load_state_dict(state["emphasis"])
        if self.timestep_sampler:
            self.timestep_sampler.load_state_dict(state["choice"])


def reference_assessment(fitted: FittedAssessor) -> Assessment:
    """His response to noise of half a deviation on the teacher's own features."""
    found = {block: fitted.reference(block) for block in fitted.blocks}
    return Assessment(
        {block: one[0] for block, one in found.items()},
        {block: one[1] for block, one in found.items()},
        {block: 1 - one[2] for block, one in found.items()},
    )


def make_running_assessment(assessor: Assessor, fusion: FusionConfig, device: torch.device) -> RunningAssessment:
    """The formula of the lambdas with all that this back-end brings for it."""
    reference = reference_assessment(assessor) if isinstance(assessor, FittedAssessor) else None
    alphas = assessor.cantor_alphas if isinstance(assessor, PublishedAssessor) else None
    return RunningAssessment(fusion, assessor.blocks, assessor.bins, reference, alphas, device)


def load_or_fit_assessor(config: DavidConfig, cache: Path, folder: Path, device: torch.device, steps: int) -> Assessor:
    """Published weights, or a David fitted to this cache, who is fitted first where `folder` holds none.

    `steps` is how many the cache's teacher has.
    """
    assessor, unsaved = _load_or_fit_unsaved(config, cache, folder, device, steps)
    if unsaved is not None:
        save(unsaved, folder / DAVID_FOLDER)
    return assessor


def _load_or_fit_unsaved(
    config: DavidConfig, cache: Path, folder: Path, device: torch.device, steps: int
) -> tuple[Assessor, FittedAssessor | None]:
    """The same with nothing written; beside him himself where he is still to be saved."""
    if config.published is None:
        david, is_new = load_or_fit(folder / DAVID_FOLDER, cache, config.fit, steps)
        return david.to(device), david if is_new else None
    made_by: Any = Manifest.open(cache).recipe.identity
    hook_point, widths = made_by["hook_point"], made_by["blocks"]
    return PublishedAssessor.open(
        config.published, hook_point, widths, steps, pattern_mode="in_bin", device=device
    ), None


class ConstantLambdas(StaticWeights):
    """The judge of a formula that does not listen: the same lambdas at every step, and the batches as they come."""

    def __init__(self, fusion: FusionConfig, blocks: tuple[str, ...], reader: Reader, device: torch.device) -> None:
        self.baseline_lambdas, self.batches = (
            RunningAssessment(fusion, blocks, bins=2, device=device).baseline_lambdas,
            reader.batches,
        )

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """The configuration's weights times w_b, or their mean."""
        return static * self.baseline_lambdas

    def summary(self) -> str:
        """What there is to say at the end of a run."""
        return "David was not asked: the lambdas are those of the configuration"


def make_block_weighter(
    config: DavidConfig,
    reader: Reader,
    blocks: tuple[str, ...],
    folder: Path,
    seed: int,
    device: torch.device,
    steps: int,
) -> DavidWeighter | ConstantLambdas:
    """David, or a judge who hears nothing where nothing depends on what is said; `steps` are the teacher's.

    One who was fitted for this is saved into `folder` once nothing of the configuration is refused any more.
    """
    if not config.affects_training:
        return ConstantLambdas(config.fusion, blocks, reader, device)
    refuse_unknown_blocks(config.fusion, blocks)  # before he is fitted, which takes minutes
    assessor, unsaved = _load_or_fit_unsaved(config, reader.folder, folder, device, steps)
    david = DavidWeighter(assessor, config, reader, seed, device)
    if unsaved is not None:
        save(unsaved, folder / DAVID_FOLDER)
    return david


def _to_floats(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {block: float(value) for block, value in tensors.items()}
