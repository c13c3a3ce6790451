"""A student's training on the training split of a cache, as `distill` and `convert` run it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.values import PictureSize
from shards.reader import Reader
from shards.stream.view import View
from stages.david.fusion import PUBLISHED_BLOCK_WEIGHTS
from stages.hub.uploader import Uploader, with_upload_hooks
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.train.block_weighter import DavidConfig, make_block_weighter
from stages.train.checkpoint import Resume
from stages.train.loop import Hooks, fit
from stages.train.objective import Objective, ObjectiveConfig, feature_scale
from stages.train.runtime import Runtime
from stages.train.setup import TrainConfig, refuse_start, refuse_uneven_batches, rows_text, run_checkpoints
from stages.train.validation import Validation, ValidationConfig


class TrainingSettings(Protocol):
    """What the configuration of a training command has."""

    @property
    def train(self) -> TrainConfig:
        """How long, how fast, how often."""

    @property
    def objective(self) -> ObjectiveConfig:
        """Terms of the loss."""

    @property
    def david(self) -> DavidConfig:
        """The assessor of the blocks."""

    @property
    def validation(self) -> ValidationConfig:
        """The states that are measured at each checkpoint."""

    @property
    def resume(self) -> Resume:
        """Whether an earlier checkpoint is taken."""


@dataclass(frozen=True)
class Alteration:
    """What an experiment changes of a training beyond its settings; its name is part of the run's identity."""

    name: str
    alter_reader: Callable[[Reader, Teacher], Reader]
    """of the rows that are trained on; held-out rows stay as they are"""


@dataclass(frozen=True)
class TrainingData:
    """Both splits of a cache, opened for this process's rows."""

    cache: Path
    reader: Reader
    held_out: Reader
    last_sample: int
    """The end of the first batch that reaches `max_samples`."""

    @classmethod
    def open(
        cls,
        cache: Path,
        train: TrainConfig,
        runtime: Runtime,
        native: PictureSize,
        view: View | None = None,
        *,
        landings: bool = False,
        x0: bool = False,
    ) -> "TrainingData":
        """Open a cache whose teacher is of the size `native`; raises `Refused` for one that is not whole.

        So it does for batches that cannot be split among processes and micro-batches. With `landings` the rows have
        those of their records, with `x0` their pictures.
        """
        reader = Reader(
            cache,
            "train",
            train.seed,
            max(1, train.batch_size // runtime.world),
            batch_pixels=train.batch_pixels,
            view=view or View(),
            rank=runtime.rank,
            world=runtime.world,
            unstated_size=native,
            landings=landings,
            x0=x0,
        )
        refuse_uneven_batches(train, runtime, _known(reader))
        held_out = Reader(cache, "validation", train.seed, unstated_size=native, landings=landings)
        return cls(cache, reader, held_out, reader.schedule.boundary(train.max_samples))

    @property
    def sizes(self) -> list[PictureSize]:
        """The picture sizes of the batches."""
        return _known(self.reader)


@dataclass(frozen=True)
class CachedTraining:
    """The training of one student on a cache; checkpoints and journal go to `folder`."""

    data: TrainingData
    settings: TrainingSettings
    folder: Path
    student: Student
    identity: Mapping[str, Any]
    """What the weights depend on beyond `settings.train` and `settings.objective`, as JSON values."""
    objective: Objective

    @classmethod
    def prepare(
        cls,
        data: TrainingData,
        settings: TrainingSettings,
        folder: Path,
        student: Student,
        identity: Mapping[str, Any],
        runtime: Runtime,
    ) -> "CachedTraining":
        """Raise `Refused` for all that training would refuse before its first step; nothing is written."""
        scale = feature_scale(data.cache, settings.objective.block_bins)
        objective = Objective(settings.objective, student.blocks, scale, PUBLISHED_BLOCK_WEIGHTS)
        runtime.on_main(refuse_start, student, objective, settings.train, folder, runtime, identity, settings.resume)
        if len(data.sizes) > 1 or settings.train.batch_pixels:
            rows = {size: data.reader.rows_of(size) for size in data.sizes}
            runtime.print_on_main(f"batches: {rows_text(rows)}")
        data.reader.batch(np.arange(1))  # the content of a shard is checked when its first record is read
        return cls(data, settings, folder, student, identity, objective)

    def make_validation(self, teacher: Teacher, runtime: Runtime) -> Validation:
        """The measurement at each checkpoint; what it measures is printed."""
        validation = Validation(self.settings.validation, self.data.held_out, self.data.reader, teacher)
        runtime.on_main(lambda: print(validation.summary(), flush=True))
        return validation

    def train(self, teacher: Teacher, hooks: Hooks, uploader: Uploader, runtime: Runtime) -> Student:
        """Train from the newest checkpoint on, and return the student with its averaged weights.

        The caller claims the folder.
        """
        settings, reader, folder = self.settings, self.data.reader, self.folder
        # Before David is fitted, because the checkpoint may be another run's.
        checkpoints = run_checkpoints(folder, settings.train, self.objective, self.identity)
        runtime.on_main(checkpoints.fetch, uploader.fetch_checkpoint, settings.resume)
        weighter = runtime.main_first(
            make_block_weighter,
            settings.david,
            reader,
            self.objective.block_weights,
            folder,
            runtime.device,
            teacher.components.schedule.steps,
        )
        sampler = weighter.timestep_sampler
        student = fit(
            self.student,
            self.objective,
            partial(sampler.batches, stream=reader.batches) if sampler else reader.batches,
            teacher.uncond,
            settings.train,
            folder,
            runtime=runtime,
            identity=self.identity,
            hooks=replace(with_upload_hooks(hooks, uploader), fetch_checkpoint=None),
            block_weighter=weighter,
            samples_per_epoch=reader.samples_per_epoch,
            last_sample=self.data.last_sample,
            sizes=self.data.sizes,
            resume=settings.resume,
        )
        runtime.print_on_main(weighter.summary())
        return student


def _known(reader: Reader) -> list[PictureSize]:
    return [size for size in reader.sizes if size is not None]
