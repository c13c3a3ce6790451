"""David in the loop: he hears what student and teacher say of each batch, and decides how much each block counts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.strict import Strict
from shards.batch import Batch
from shards.manifest import Manifest
from shards.reader import Reader
from stages.david.assessment import Assessment, Assessor, Posterior, assess_block, bins_of, soft_targets
from stages.david.assessor import Fitted
from stages.david.companion import FitConfig
from stages.david.fusion import FusionConfig
from stages.david.profile import Profile, right
from stages.david.published import Published
from stages.david.sampling import SamplingConfig
from stages.david.saved import opened, save
from stages.david.time_choice import TimeChoice
from stages.david.variation import Emphasis, Variation
from stages.david.voice import Voice, refuse_unknown
from stages.nets.student import StudentOutput
from stages.train.judge import Nobody

FOLDER = "david"
DEAF = ("static", "uniform")
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
    def is_asked(self) -> bool:
        """Whether anything depends on what he says."""
        return self.fusion.formula not in DEAF or self.sampling.scheme != "stored"


class David:
    """The judge of a run of distillation."""

    def __init__(
        self, assessor: Assessor, config: DavidConfig, reader: Reader, seed: int, device: torch.device
    ) -> None:
        self.assessor, self.reader = assessor, reader
        self._fitted = assessor if isinstance(assessor, Fitted) else None
        self.voice = voice_of(assessor, config.fusion, device)
        self.emphasis = Emphasis(self.voice.quiet)
        self._counted = torch.ones(len(assessor.blocks), dtype=torch.bool, device=device)
        self.choice: TimeChoice | None = None
        if config.sampling.scheme != "stored":
            profile = Profile(config.fusion, assessor.bins, config.sampling.profile_samples, device)
            rows = reader.batch_size * reader.world
            self.choice = TimeChoice(config.sampling, profile, seed, reader.pairs, reader.steps, assessor.steps, rows)

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """The configuration's weights times what David says."""
        self._counted = static > 0
        return static * self.voice.lambdas()

    def hear(self, batch: Batch, output: StudentOutput, omega: Float[Tensor, " b"]) -> Sequence[Tensor]:
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
            reliable = {block: self._fitted.reliable(block, bins) for block in self.assessor.blocks}
        said = self.voice.hear(assessed, omega if self.choice else None, reliable)
        return (said, self.choice.profile.see(bins, assessed, right(teacher, bins))) if self.choice else (said,)

    def learn(self, heard: Sequence[Tensor], samples: int) -> None:
        """Take in the sums over a step, whose lambdas were those from before it."""
        if self.voice.is_warm:
            self.emphasis.see(self.voice.lambdas())
        self.voice.learn(heard[0], samples)
        if self.choice:
            self.choice.profile.learn(heard[1], samples)

    def omega(self, batch: Batch) -> Float[Tensor, " b"]:
        """pi / q of each sample where David chooses the times, else 1."""
        return self.choice.omega(batch.k) if self.choice else torch.ones_like(batch.s)

    def batches(self, start_sample: int) -> Iterator[Batch]:
        """The batches of the run from this sample on: at the times that David chooses, or as the cache holds them."""
        return (
            self.choice.batches(start_sample, self.reader.batches) if self.choice else self.reader.batches(start_sample)
        )

    def told(self) -> dict[str, Any]:
        """What he says of each block at present, how much lambda varied because of him, and what a sample is worth."""
        said = self.voice.assessment()
        line = {name: _plain(getattr(said, name)) for name in ("timestep_error", "pattern_error", "coherence")}
        found = self.variation()
        varied = {"over_blocks": found.over_blocks, "over_time": found.over_time} if found else {}
        worth = {"effective_share": self.choice.effective_share()} if self.choice else {}
        return {**line, "lambda_variation": varied, **worth}

    def variation(self) -> Variation | None:
        """How much lambda varied because of him, over the blocks whose loss counts; None within the warm-up."""
        return self.emphasis.variation(self._counted)

    def verdict(self) -> str:
        """Whether he was heard, for the end of a run."""
        found = self.variation()
        return found.told() if found else "David was not heard: the run ended within fusion.warmup_samples"

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        state = {"voice": self.voice.state_dict(), "emphasis": self.emphasis.state_dict()}
        return state | ({"choice": self.choice.state_dict()} if self.choice else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self.voice.load_state_dict(state["voice"])
        self.emphasis.load_state_dict(state["emphasis"])
        if self.choice:
            self.choice.load_state_dict(state["choice"])


def reference_of(fitted: Fitted) -> Assessment:
    """His response to noise of half a deviation on the teacher's own features."""
    found = {block: fitted.reference(block) for block in fitted.blocks}
    return Assessment(
        {block: one[0] for block, one in found.items()},
        {block: one[1] for block, one in found.items()},
        {block: 1 - one[2] for block, one in found.items()},
    )


def voice_of(assessor: Assessor, fusion: FusionConfig, device: torch.device) -> Voice:
    """The formula of the lambdas with all that this back-end brings for it."""
    reference = reference_of(assessor) if isinstance(assessor, Fitted) else None
    alphas = assessor.alphas if isinstance(assessor, Published) else None
    return Voice(fusion, assessor.blocks, assessor.bins, reference, alphas, device)


def assessor_of(config: DavidConfig, cache: Path, folder: Path, device: torch.device, steps: int) -> Assessor:
    """Published weights, or a David fitted to this cache, who is fitted first where `folder` holds none.

    `steps` is how many the cache's teacher has.
    """
    assessor, unsaved = _opened(config, cache, folder, device, steps)
    if unsaved is not None:
        save(unsaved, folder / FOLDER)
    return assessor


def _opened(
    config: DavidConfig, cache: Path, folder: Path, device: torch.device, steps: int
) -> tuple[Assessor, Fitted | None]:
    """The same with nothing written; beside him himself where he is still to be saved."""
    if config.published is None:
        david, is_new = opened(folder / FOLDER, cache, config.fit, steps)
        return david.to(device), david if is_new else None
    made_by: Any = Manifest.open(cache).recipe.identity
    hook_point, widths = made_by["hook_point"], made_by["blocks"]
    return Published.open(config.published, hook_point, widths, steps, patterns="in_bin", device=device), None


class Deaf(Nobody):
    """The judge of a formula that does not listen: the same lambdas at every step, and the batches as they come."""

    def __init__(self, fusion: FusionConfig, blocks: tuple[str, ...], reader: Reader, device: torch.device) -> None:
        self.quiet, self.batches = Voice(fusion, blocks, bins=2, device=device).quiet, reader.batches

    def lambdas(self, static: Float[Tensor, " n_blocks"]) -> Float[Tensor, " n_blocks"]:
        """The configuration's weights times w_b, or their mean."""
        return static * self.quiet

    def verdict(self) -> str:
        """What there is to say at the end of a run."""
        return "David was not asked: the lambdas are those of the configuration"


def judge_of(
    config: DavidConfig,
    reader: Reader,
    blocks: tuple[str, ...],
    folder: Path,
    seed: int,
    device: torch.device,
    steps: int,
) -> David | Deaf:
    """David, or a judge who hears nothing where nothing depends on what is said; `steps` are the teacher's.

    One who was fitted for this is saved into `folder` once nothing of the configuration is refused any more.
    """
    if not config.is_asked:
        return Deaf(config.fusion, blocks, reader, device)
    refuse_unknown(config.fusion, blocks)  # before he is fitted, which takes minutes
    assessor, unsaved = _opened(config, reader.folder, folder, device, steps)
    david = David(assessor, config, reader, seed, device)
    if unsaved is not None:
        save(unsaved, folder / FOLDER)
    return david


def _plain(said: Mapping[str, Tensor]) -> dict[str, float]:
    return {block: float(value) for block, value in said.items()}
