"""The settings of `sollune convert`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.values import NonEmpty, Strict
from stages import cache_teacher
from stages.cache.sizes import SizeShare, refuse_repeated_sizes
from stages.cache.targets import RenderConfig, StatesConfig
from stages.convert.starts import START_NAMES, StartName
from stages.convert.verdict import VERDICT_STEPS
from stages.david.fusion import FusionConfig
from stages.flow.bridge import TailPolicy
from stages.flow.timesteps import TimestepDensity
from stages.hub.uploader import HubConfig
from stages.prompts import PromptSource
from stages.sampling.grids import GridConfig
from stages.sampling.sampler import Sampler
from stages.teacher_files.source import TeacherMove, TeacherSource
from stages.train.block_weighter import DavidConfig
from stages.train.checkpoint import Resume
from stages.train.objective import ObjectiveConfig
from stages.train.optim import OptimizerConfig
from stages.train.setup import TrainConfig
from stages.train.validation import ValidationConfig


class PolishRender(Strict):
    """How the prompts of the polish become records, under the tail policy of the base."""

    states: StatesConfig = Field(
        # Half of the states then lie above s = .7, where a delta is lost and a picture's composition is decided.
        StatesConfig(trajectory_states=3, renoised_states=3, density=TimestepDensity(shift=5.5, uniform_share=0.0)),
        description="which states of a picture are kept",
    )
    records_per_shard: int = Field(50, ge=1, description="prompts in one shard: the unit of work and of resuming")
    batch_size: int = Field(
        50,
        ge=1,
        description="prompts of the model's own size in one batch of it, of other sizes as many as have no more "
        "pixels, at least one; part of the recipe",
    )
    sizes: tuple[SizeShare, ...] = Field(
        (),
        description="picture sizes that the base learnt, and their shares of the prompts, '[{size: 512x768, share: "
        ".3}, ...]'; none: all of them, with the shares of its cache",
    )

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: tuple[SizeShare, ...]) -> tuple[SizeShare, ...]:
        return tuple(refuse_repeated_sizes(sizes))

    def under(self, tail: TailPolicy, sizes: Sequence[SizeShare]) -> RenderConfig:
        """The same for a cache under a tail policy and with these sizes."""
        own = {name: getattr(self, name) for name in ("records_per_shard", "batch_size")}
        states = self.states.model_copy(update={"windows": self.states.windows or 0})
        return RenderConfig(tail=tail, sizes=tuple(sizes), states=states, **own)


class ProbeConfig(Strict):
    """How the starts are compared before the polish: by the paired error from fixed noises."""

    prompts: int = Field(32, ge=2, description="validation prompts")
    sampler: Sampler = Field(Sampler(guidance=3.0), description="how the pictures are sampled")


class VerdictConfig(Strict):
    """How the polished student is compared with both starts and the base's student."""

    prompts: int = Field(64, ge=2, description="validation prompts, others than the probe's as far as there are")
    steps: tuple[int, ...] = Field(VERDICT_STEPS, min_length=1, description="numbers of steps that are compared")
    sampler: Sampler = Field(Sampler(guidance=3.0), description="solver, guidance and shift; its steps are not used")


class Config(Strict):
    """Convert a fine-tune, starting from the student of its base model: `sollune convert MODEL --base RUN --out RUN2`.

    RUN2/cache holds the fine-tune's own predictions, RUN2/distill the run, as distill writes it.
    """

    teacher: TeacherSource | None = Field(None, description="the fine-tune: a folder, a hub id, or a single file")
    mix: tuple[NonEmpty, ...] = Field(
        (),
        description="in its place a mix of fine-tunes MODEL:WEIGHT of the base's teacher, such as A:0.6 B:0.4: that "
        "teacher plus the weighted differences",
    )
    base: Path = Field(description="run folder of the base model's conversion, such as runs/tiny")
    base_teacher: TeacherMove | None = Field(
        None, description="where the base's teacher lies now, if it moved since its cache was made"
    )
    out: Path = Field(description="run folder of the conversion; another than the base's")
    start: Literal["auto", StartName] = Field(
        "auto",
        description="delta: the base's student plus what the fine-tune changed; graft: the fine-tune with its time "
        "embedding re-solved; auto: the nearer one by the probe",
    )
    prompts: PromptSource | None = Field(
        None, description="where the sentences come from; none takes the source of the base's cache"
    )
    seed: int = Field(1, description="seed of the prompts and of their pictures")
    count: int = Field(300, ge=1, description="prompts that the polish learns from")
    validation_count: int = Field(50, ge=1, description="prompts held out for validation")
    render: PolishRender = Field(PolishRender(), description="how prompts become records")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="precision of the fine-tune while its cache is made, as in cache-teacher"
    )
    workers: int = Field(1, ge=1, description="processes that fill the cache together, as in cache-teacher")
    probe: ProbeConfig = Field(ProbeConfig(), description="how the starts are compared")
    train: TrainConfig = Field(
        TrainConfig(
            max_samples=6400,
            checkpoint_every_samples=3200,
            optimizer=OptimizerConfig(warmup_samples=640),
        ),
        description="how long, how fast, how often",
    )
    objective: ObjectiveConfig = Field(ObjectiveConfig(block_weight=0), description="terms of the loss")
    david: DavidConfig = Field(
        DavidConfig(fusion=FusionConfig(formula="static")),
        description="the assessor of the blocks; none is fitted unless a formula or the sampling of times needs it",
    )
    gate: float | None = Field(
        None,
        gt=0,
        description="paired score, measured as in the probe at each checkpoint, at which the polish ends; none: it "
        "ends after train.max_samples",
    )
    validation: ValidationConfig = Field(ValidationConfig(), description="states measured at each checkpoint")
    verdict: VerdictConfig = Field(VerdictConfig(), description="what is measured at the end")
    grid: GridConfig = Field(GridConfig(), description="grid of teacher, start and polished at each checkpoint")
    hub: HubConfig = Field(HubConfig(), description="where the run is uploaded to")
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    plan: bool = Field(False, description="measure a few prompts, print what each part will cost, and make nothing")
    no_disk_check: bool = Field(False, description="start, and go on, even if the disk looks too small")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")

    @model_validator(mode="after")
    def _check_model(self) -> "Config":
        if self.teacher is None and not self.mix:
            raise ValueError("which model? - name it first, as in sollune convert MODEL, or give --mix A:0.6 B:0.4")
        if self.teacher is not None and self.mix:
            raise ValueError(
                f"{self.teacher.location} and --mix {self.mix[0]}: a mix takes the place of the model, and starts from "
                "the base's teacher - leave one of them out"
            )
        return self

    @property
    def start_names(self) -> tuple[StartName, ...]:
        """The starts that the probe compares."""
        return START_NAMES if self.start == "auto" else (self.start,)

    def cache_config(
        self, teacher: TeacherSource, prompts: PromptSource, tail: TailPolicy, sizes: Sequence[SizeShare]
    ) -> cache_teacher.Config:
        """The settings with which `cache-teacher` makes the same cache."""
        return cache_teacher.Config(
            run=self.out,
            teacher=teacher,
            prompts=prompts,
            seed=self.seed,
            count=self.count,
            validation_count=self.validation_count,
            render=self.render.under(tail, sizes),
            device=self.device,
            dtype=self.dtype,
            workers=self.workers,
            no_disk_check=self.no_disk_check,
        )
