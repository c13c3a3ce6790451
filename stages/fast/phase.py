"""The training of students of few steps: each number of windows from the student before it, into RUN/fast/<windows>."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from shards.manifest import Manifest
from shards.stream.view import View
from stages.cached_training import TrainingData
from stages.export import export_all, export_paths
from stages.export.existing import refuse_occupied
from stages.fast.config import POSSIBLE_WINDOWS, FastConfig
from stages.fast.grids import Column, window_grid_hook
from stages.fast.identity import identity_targets
from stages.fast.rows import RowShares, WindowRows
from stages.fast.validation import WindowValidation
from stages.hub.uploader import make_uploader, with_upload_hooks
from stages.nets.guidance import embed_guidance
from stages.nets.run_folder import (
    COMPLETE_MARK,
    FAST_FOLDER,
    Origin,
    SavedRun,
    load_run_teacher,
    load_student,
    open_run,
)
from stages.nets.student import Student
from stages.nets.student_shape import prune_unet
from stages.nets.teacher import Teacher
from stages.sampling.fields import student_field
from stages.sampling.grids import GridConfig
from stages.system.atomic import atomic_write
from stages.system.disk import file_sha256
from stages.system.ownership import refuse_claimed
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherMove
from stages.train.checkpoint import Resume
from stages.train.loop import Hooks, fit
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.runtime import Runtime
from stages.train.setup import CLAIM_PURPOSE, claim_on_main, refuse_start, refuse_uneven_batches

NOT_TRAINED = "not trained yet"
"""In place of the digest of a start that this command makes first."""


class FastSettings(Protocol):
    """What the configuration of the command has."""

    @property
    def run(self) -> Path:
        """The run folder; its cache is read."""

    @property
    def windows(self) -> tuple[int, ...]:
        """The numbers of windows, one after the other."""

    @property
    def fast(self) -> FastConfig:
        """The settings of the training."""

    @property
    def view(self) -> View:
        """The samples of the cache that are trained on."""

    @property
    def grid(self) -> GridConfig:
        """The comparison grids."""

    @property
    def teacher(self) -> TeacherMove | None:
        """Where the teacher lies now, if it moved."""

    @property
    def resume(self) -> Resume:
        """Whether an earlier checkpoint is taken."""


def fast_folder(run: Path, windows: int) -> Path:
    """The run folder of a student of so many steps."""
    return run / FAST_FOLDER / str(windows)


def train_fast(settings: FastSettings, settings_text: str, runtime: Runtime) -> None:
    """Refuse what cannot be done with any of the windows, then train and export a student for each of them.

    `settings_text` is kept in each run folder. Finished work is not repeated.
    """
    phase = Phase.prepare(settings, settings_text, runtime)
    for windows in settings.windows:
        phase.train(windows)
    runtime.close()


@dataclass(frozen=True)
class Phase:
    """The students of one command, and what all of them share."""

    settings: FastSettings
    settings_text: str
    runtime: Runtime
    recipe_sha256: str
    origin: Origin
    """Of the cache; without windows."""
    guidance_range: tuple[float, float]
    teacher: Teacher
    data: TrainingData
    objective: Objective

    @classmethod
    def prepare(cls, settings: FastSettings, settings_text: str, runtime: Runtime) -> "Phase":
        """Raise `Refused` for all that any of the trainings would refuse; nothing is written."""
        train, cache = settings.fast.train, settings.run / "cache"
        refuse_uneven_batches(train, runtime)
        for windows in settings.windows:
            runtime.on_main(refuse_claimed, fast_folder(settings.run, windows), CLAIM_PURPOSE)
        manifest = Manifest.open(cache)
        origin = Origin.from_manifest(manifest, settings.teacher)
        if settings.view.size:
            origin = replace(origin, sizes=(str(settings.view.size),))
        start = open_start(settings.fast.start or settings.run / "distill")
        refuse_other_start(start, origin, settings.windows[0])
        origin = replace(origin, prune=start.origin.prune, scratch=start.origin.scratch)
        teacher = Teacher(load_run_teacher(origin, runtime.device, torch.float32), origin.tail)
        native = teacher.components.native_size
        data = TrainingData.open(cache, train, runtime, native, settings.view, landings=True)
        if settings.fast.identity_share < 1:
            manifest.refuse_without_landings(cache)
        refuse_windows(settings.windows, data)
        states: Any = manifest.recipe.identity["render"]
        low, high = (float(states["states"][name]) for name in ("guidance_min", "guidance_max"))
        objective = Objective(
            ObjectiveConfig(uncond_weight=0, guidance_weight=0, block_weight=0, block_weights={}), blocks=()
        )
        recipe = manifest.recipe.fingerprint()
        phase = cls(settings, settings_text, runtime, recipe, origin, (low, high), teacher, data, objective)
        phase._refuse_starts()
        return phase

    def train(self, windows: int) -> None:
        """Train from the newest checkpoint on, then export."""
        settings, runtime, teacher, data = self.settings, self.runtime, self.teacher, self.data
        fast, folder, origin = settings.fast, fast_folder(settings.run, windows), self._origin_of(windows)
        start = open_start(self._start_of(windows))
        shares = RowShares(fast.landing_share, fast.identity_share)
        student, identity = self._starting_student(start), self._identity(windows, start)
        validation = WindowValidation(
            data.held_out, windows, fast.validation_states, RowShares(fast.landing_share), runtime.device
        )
        hooks = Hooks(
            on_start=partial(save_settings, self.settings_text, origin, folder),
            validate=validation,
            on_checkpoint=window_grid_hook(
                teacher, settings.grid, self._earlier(windows), windows, folder / "grids", self._sizes
            ),
        )
        runtime.print_on_main(f"{windows} windows: from {start.folder}, after {start.samples} samples")
        runtime.on_main(lambda: print(validation.summary(), flush=True))
        with make_uploader(fast.hub, folder, runtime.is_main) as uploader, claim_on_main(folder, runtime):
            student = fit(
                student,
                self.objective,
                WindowRows(data.reader, windows, shares, fast.train.seed).batches,
                teacher.uncond,
                fast.train,
                folder,
                runtime=runtime,
                identity=identity,
                hooks=with_upload_hooks(hooks, uploader),
                samples_per_epoch=data.reader.samples_per_epoch,
                last_sample=data.last_sample,
                sizes=data.sizes,
                resume=settings.resume,
                targets=partial(identity_targets, windows=windows) if fast.identity_share else None,
            )
            runtime.on_main(export_student, origin, teacher, student, folder, data.last_sample)
            uploader.send_export(folder / "export")

    @property
    def _sizes(self) -> Sequence[Any]:
        return self.origin.learnt_sizes(self.teacher.components.native_size)

    def _origin_of(self, windows: int) -> Origin:
        return replace(self.origin, windows=windows, guidance_range=self.guidance_range)

    def _start_of(self, windows: int) -> Path:
        """The run that a student of so many steps starts from: that before it in the list, or the first one's."""
        before = dict(zip(self.settings.windows[1:], self.settings.windows, strict=False))
        if windows in before:
            return fast_folder(self.settings.run, before[windows])
        return self.settings.fast.start or self.settings.run / "distill"

    def _identity(self, windows: int, start: SavedRun | None) -> dict[str, Any]:
        """What the weights depend on beyond the training's own settings."""
        view, fast = self.settings.view, self.settings.fast
        return {
            "recipe": self.recipe_sha256,
            "windows": windows,
            "start": self.runtime.on_main(file_sha256, start.weights) if start else NOT_TRAINED,
            "landing_share": fast.landing_share,
            **({"identity_share": fast.identity_share} if fast.identity_share else {}),
            "view": view.model_dump(mode="json", exclude=None if view.size else {"size"}),
        }

    def _starting_student(self, start: SavedRun) -> Student:
        """A trainable copy of a run's student, which takes the guidance scale."""
        return Student.from_teacher(embed_guidance(load_student(start, self.teacher.components).unet))

    def _refuse_starts(self) -> None:
        """Raise `Refused` where a run folder of the list holds another run, or a file that would be lost.

        So it does for a grid at a guidance scale that no student learns.
        """
        settings, runtime = self.settings, self.runtime
        unet = prune_unet(self.teacher.components.unet, self.origin.prune)
        student = Student.from_teacher(embed_guidance(unet))
        field = student_field(student, windows=settings.windows[0], guidance_range=self.guidance_range)
        field.check_guidance(settings.grid.sampler.guidance, "grid.sampler.guidance")
        start: SavedRun | None = open_start(self._start_of(settings.windows[0]))
        for windows in settings.windows:
            folder, origin = fast_folder(settings.run, windows), self._origin_of(windows)
            identity = self._identity(windows, start)
            args = (student, self.objective, settings.fast.train, folder, runtime, identity, settings.resume)
            runtime.on_main(refuse_start, *args)
            exported = export_paths(origin, origin.export_facts(self.teacher.components, 0))
            runtime.on_main(refuse_occupied, folder / "export", exported)
            start = open_run(folder) if (folder / COMPLETE_MARK).is_file() else None

    def _earlier(self, windows: int) -> list[Column]:
        """The students from which this one comes: that of as many steps as the teacher's, then those of fewer."""
        settings = self.settings
        before = settings.windows[: settings.windows.index(windows)]
        folders = dict.fromkeys(map(self._start_of, (*before, windows)))
        distilled = settings.run / "distill"
        if (distilled / COMPLETE_MARK).is_file():
            folders = dict.fromkeys((distilled, *folders))
        runs = [open_run(folder) for folder in folders]
        return [Column(run.origin.windows, partial(load_student, run, self.teacher.components)) for run in runs]


def open_start(folder: Path) -> SavedRun:
    """A finished run; raises `Refused` for any other folder."""
    if not (folder / COMPLETE_MARK).is_file():
        raise Refused(
            f"{folder}: no finished run to start from ({COMPLETE_MARK} is missing) - run sollune distill without "
            "--windows to its end first, or name a finished run with --fast.start"
        )
    return open_run(folder)


def refuse_other_start(start: SavedRun, origin: Origin, windows: int) -> None:
    """Raise `Refused` for a run whose student cannot be the start of one of so many steps on this cache."""
    if start.origin.target != "velocity":
        raise Refused(
            f"{start.folder}: predicts {start.origin.target}, and few steps need a velocity (target velocity) - name "
            "another run with --fast.start"
        )
    if start.origin.teacher_sha256 != origin.teacher_sha256:
        raise Refused(
            f"{start.folder}: has another teacher ({start.origin.teacher}) than the cache ({origin.teacher}) - name a "
            "run of the same teacher with --fast.start"
        )
    before = start.origin.windows
    if before is not None and (windows >= before or before % windows):
        raise Refused(
            f"windows {windows}: the start {start.folder} has {before} windows, and {windows} is no smaller divisor of "
            "that - name another run with --fast.start, such as RUN/distill"
        )


def refuse_windows(windows: Sequence[int], data: TrainingData) -> None:
    """Raise `Refused` for windows whose ends are not all among the landings of the cache."""
    # The content of a shard is checked when its first record is read.
    landings = data.reader.batch(np.arange(1)).landing_s
    assert landings is not None
    most = landings.shape[1] - 1
    if most and (wrong := [number for number in windows if most % number]):
        possible = " ".join(str(number) for number in POSSIBLE_WINDOWS if most % number == 0)
        raise Refused(
            f"windows {wrong[0]}: {data.cache} holds the landings of {most} windows - take one of {possible}, or make "
            f"a cache with render.states.windows {wrong[0]}"
        )


def save_settings(settings_text: str, origin: Origin, folder: Path) -> None:
    """Save in the run folder what it takes to repeat the run."""
    atomic_write(folder / "config.yaml", settings_text)
    origin.save(folder)


def export_student(origin: Origin, teacher: Teacher, student: Student, folder: Path, samples: int) -> None:
    """Export the student after so many samples, verified."""
    facts = origin.export_facts(teacher.components, samples)
    exported = export_all(student, teacher.components.present_folder(), folder / "export", facts)
    atomic_write(folder / COMPLETE_MARK, f"{samples}\n")
    print(f"{', '.join(map(str, exported))}: written and verified; pictures in {folder / 'grids'}")
