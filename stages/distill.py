"""`sollune distill`: train a velocity model on the teacher's cached predictions."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from configs.load import resolved_yaml
from configs.values import PictureSize
from shards.manifest import Manifest
from shards.stream.view import View
from stages.cached_training import Alteration, CachedTraining, TrainingData
from stages.export import export_all, export_paths
from stages.export.existing import refuse_occupied
from stages.fast.config import FastConfig, windows_error
from stages.fast.phase import fast_folder, train_fast
from stages.hub.uploader import HubConfig, make_uploader
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import Origin, load_run_teacher
from stages.nets.student import Student, Target, make_vp_bridge
from stages.nets.student_shape import StudentConfig, cost_text
from stages.nets.teacher import Teacher
from stages.sampling.grids import GridConfig, comparison_grid_hook
from stages.scale.fleet import FleetOptions, TrainingWork
from stages.scale.operations import pass_operations
from stages.scale.rates import BRANCHES, FORWARD_AND_BACKWARD
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.ownership import refuse_claimed
from stages.system.refusal import Refused
from stages.teacher_files.recorded import find_teacher
from stages.teacher_files.source import TeacherMove
from stages.train.block_weighter import DavidConfig
from stages.train.checkpoint import Resume
from stages.train.loop import Hooks
from stages.train.objective import ObjectiveConfig
from stages.train.runtime import Runtime, is_launched, launch
from stages.train.setup import (
    CLAIM_PURPOSE,
    TrainConfig,
    batch_rows,
    batch_split_error,
    claim_on_main,
    refuse_launch,
    refuse_uneven_batches,
    training_sizes,
)
from stages.train.validation import ValidationConfig

UNUSED_WITH_WINDOWS = {
    "graft": "the start is a student already, leave it out",
    "student": "the start is a student already, and keeps its layers, leave it out",
    "train": "with --windows the training is --fast.train",
    "objective": "with --windows the loss has one term, leave it out",
    "david": "with --windows no block is assessed, leave it out",
    "validation": "with --windows the states are --fast.validation-states",
    "hub": "with --windows the repository is --fast.hub",
}
"""Settings that the training for few steps does not use, each with the way out."""


class Config(FleetOptions):
    """Distil RUN/cache into a velocity model; checkpoints, journal, grids and export go to RUN/distill.

    With windows, the student of RUN/distill is trained on for few steps instead, into RUN/fast/<windows>.
    """

    run: Path = Field(description="run folder; reads RUN/cache, writes RUN/distill")
    teacher: TeacherMove | None = Field(
        None, description="where the teacher lies now, if it moved since the cache was made"
    )
    target: Target = Field(
        "velocity",
        description="velocity: of the straight path, time input 1000 s; vp_v: v-prediction on the teacher's path, as "
        "in the original experiment (exported for DDIM and related schedulers)",
    )
    student: StudentConfig = Field(StudentConfig(), description="the layers of the student, and its first weights")
    graft: bool | None = Field(
        None,
        description="start from the closed-form graft of the time embedding; none does, for target velocity and the "
        "teacher's weights",
    )
    view: View = Field(View(), description="which samples of the cache are trained on; all by default")
    train: TrainConfig = Field(TrainConfig(), description="how long, how fast, how often")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="terms of the loss")
    david: DavidConfig = Field(DavidConfig(), description="the assessor of the blocks, and its influence on the loss")
    validation: ValidationConfig = Field(ValidationConfig(), description="states measured at each checkpoint")
    grid: GridConfig = Field(GridConfig(), description="comparison grid generated at each checkpoint")
    windows: tuple[int, ...] = Field(
        (),
        description="numbers of steps of the students that are trained from the finished RUN/distill, one after the "
        "other, such as 4 2 1; none distils",
    )
    fast: FastConfig = Field(FastConfig(), description="that training for few steps; train and the like are not used")
    hub: HubConfig = Field(HubConfig(), description="where the run is uploaded to")
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    processes: int = Field(1, ge=1, description="processes that share each batch: one for each GPU, or core of a CPU")

    @field_validator("windows", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(number, bool) for number in value):
            raise ValueError("should be numbers of steps such as 4 2 1, not true or false")
        return [value] if type(value) is int else value

    @model_validator(mode="after")
    def _check_graft_target(self) -> "Config":
        if self.graft and self.target != "velocity":
            raise ValueError(
                "graft is for target velocity: a vp_v student takes the teacher's own steps - leave it out"
            )
        if self.graft and self.student.scratch:
            raise ValueError(
                "graft true and student.scratch true: random weights have no time embedding of the teacher to graft - "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> "Config":
        if error := windows_error(self.windows):
            raise ValueError(error)
        if self.windows and self.target != "velocity":
            raise ValueError(f"windows are for target velocity, and target is {self.target} - leave one of them out")
        if len(self.windows) > 1 and self.fast.hub.repo:
            raise ValueError(
                f"fast.hub.repo {self.fast.hub.repo} is for one run, and windows are {len(self.windows)} - name one "
                "number of windows, or leave the repository out and publish each run afterwards"
            )
        return self

    def unused_keys(self) -> Mapping[str, str]:
        """Those of the training that this command does not do."""
        return UNUSED_WITH_WINDOWS if self.windows else {"fast": "it is for few steps, add --windows such as 4 2 1"}

    @model_validator(mode="after")
    def _check_plan(self) -> "Config":
        if self.plan and self.gpus is None:
            raise ValueError("plan true: says not of which GPUs - add --gpus such as 8, and --gpu such as h100")
        if self.plan and self.windows:
            raise ValueError("plan true: is made for the distillation, not for windows - leave one of them out")
        return self

    @property
    def used_train(self) -> TrainConfig:
        """The settings of the training that this command does."""
        return self.fast.train if self.windows else self.train

    @property
    def is_grafted(self) -> bool:
        """Whether the student starts from the graft."""
        return self.student.grafts(self.graft, self.target)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The run folders that it writes."""
        return tuple(fast_folder(self.run, number) for number in self.windows) or (self.run / "distill",)


def run(config: Config) -> None:
    """Train from the last checkpoint on, then export, in `processes` processes; finished work is not repeated."""
    if (fleet := config.fleet()) is not None:
        print("\n".join(training_work(config, fleet.gpus).lines(fleet)))
        return
    if config.processes == 1 or is_launched():
        runtime = Runtime(device_of(config.device), config.used_train.precision)
        with runtime.report_refusal_once():
            if config.windows:
                train_fast(config, resolved_yaml(config, "distill", config.unused_keys()), runtime)
            else:
                distill(config, runtime)
        return
    for folder in config.folders:
        refuse_claimed(folder, CLAIM_PURPOSE)
    origin = Origin.from_manifest(Manifest.open(config.run / "cache"), config.teacher)
    teacher = find_teacher(origin.teacher_sources()).folder
    cache = config.run / "cache"
    sizes = [config.view.size] if config.view.size else training_sizes(cache, teacher)
    device, prune = device_of(config.device), config.student.prune
    refuse_launch(config.used_train, config.processes, device, teacher, cache, sizes=sizes, prune=prune)
    launch(config, "distill", config.processes)


def training_work(config: Config, gpus: int) -> TrainingWork:
    """The whole training in counted operations; the cache may be a small one of the same teacher.

    Raises `Refused` where the rows of a batch do not divide among so many GPUs.
    """
    train, manifest = config.train, Manifest.open(config.run / "cache")
    origin = Origin.from_manifest(manifest, config.teacher, config.target)
    teacher = Teacher(load_run_teacher(origin, torch.device("cpu"), torch.float32), origin.tail)
    native = teacher.components.native_size
    shards = [one for one in manifest.shards_of("train") if config.view.size in (None, one.size or native)]
    states = Counter[PictureSize]()
    for shard in shards:
        states[shard.size or native] += shard.draws
    if not states:
        raise Refused(f"{config.run / 'cache'}: holds no state to train on - make it, or choose another view.size")
    split = train.batch_size, gpus, train.accumulate, train.batch_pixels, [*states]
    if error := batch_split_error(*split, section=train.section):
        raise Refused(error)
    total = sum(states.values())
    rows = batch_rows([*states], train.batch_size, train.batch_pixels)
    passes = BRANCHES * (FORWARD_AND_BACKWARD + (1 if train.gradient_checkpointing else 0))
    return TrainingWork(
        samples=train.max_samples,
        rows=round(sum(rows[size] * number for size, number in states.items()) / total),
        operations=passes * sum(pass_operations(teacher, size) * number for size, number in states.items()) / total,
        weights=sum(value.numel() for value in teacher.components.unet.parameters()),
        cache_bytes=sum(shard.bytes for shard in shards),
        cache_shards=len(shards),
        cache_states=total,
        is_single=train.precision == "fp32",
    )


def distill(config: Config, runtime: Runtime, alteration: Alteration | None = None) -> None:
    """The work of each process: refuse what cannot be done, then train and export.

    An experiment may have an `alteration`; the product has none.
    """
    cache, folder, device = config.run / "cache", config.run / "distill", runtime.device
    refuse_uneven_batches(config.train, runtime)
    runtime.on_main(refuse_claimed, folder, CLAIM_PURPOSE)
    manifest = Manifest.open(cache)
    origin = Origin.from_manifest(manifest, config.teacher, config.target)
    if config.view.size:
        origin = replace(origin, sizes=(str(config.view.size),))
    origin = replace(origin, prune=config.student.prune, scratch=config.student.scratch)
    teacher = Teacher(load_run_teacher(origin, device, torch.float32), origin.tail)
    native = teacher.components.native_size
    data = TrainingData.open(cache, config.train, runtime, native, config.view, x0=config.objective.needs_x0)
    exported = export_paths(origin, origin.export_facts(teacher.components, 0))
    runtime.on_main(refuse_occupied, folder / "export", exported)

    schedule = teacher.components.schedule
    bridge, shape = make_vp_bridge(config.target, schedule, origin.tail), config.student
    student = shape.make(teacher.components.unet, bridge, config.train.seed)
    error = graft_time_embedding(student.unet, teacher.bridge) if config.is_grafted else None
    start = "random weights" if shape.scratch else "a plain copy"
    runtime.print_on_main(
        f"student: time embedding grafted, relative error {error:.3f}" if config.is_grafted else f"student: {start}"
    )
    if shape.prune != "none":
        runtime.print_on_main(f"student: pruned ({shape.prune}): {cost_text(teacher.components.unet, student.unet)}")
    identity = {
        "recipe": manifest.recipe.fingerprint(),
        "target": config.target,
        "graft": config.is_grafted,
        **shape.identity(),
        "view": config.view.model_dump(mode="json", exclude=None if config.view.size else {"size"}),
        "david": config.david.model_dump(mode="json"),
    }
    if alteration is not None:
        data = replace(data, reader=alteration.alter_reader(data.reader, teacher))
        identity["alteration"] = alteration.name
    training = CachedTraining.prepare(data, config, folder, student, identity, runtime)
    hooks = Hooks(
        on_start=partial(save_settings, config, origin),
        validate=training.make_validation(teacher, runtime),
        on_checkpoint=comparison_grid_hook(teacher, config.grid, folder / "grids", origin.learnt_sizes(native)),
    )
    with make_uploader(config.hub, folder, runtime.is_main) as uploader, claim_on_main(folder, runtime):
        student = training.train(teacher, hooks, uploader, runtime)
        runtime.on_main(export_student, config, origin, teacher, student, data.last_sample)
        uploader.send_export(folder / "export")
        runtime.close()


def save_settings(config: Config, origin: Origin) -> None:
    """Save in the run folder what it takes to repeat the run."""
    folder = config.run / "distill"
    atomic_write(folder / "config.yaml", resolved_yaml(config, "distill"))
    origin.save(folder)


def export_student(config: Config, origin: Origin, teacher: Teacher, student: Student, samples: int) -> None:
    """Export the student after so many samples, verified."""
    folder = config.run / "distill"
    facts = origin.export_facts(teacher.components, samples)
    exported = export_all(student, teacher.components.present_folder(), folder / "export", facts)
    atomic_write(folder / "COMPLETE", f"{samples}\n")
    print(f"{', '.join(map(str, exported))}: written and verified; pictures in {folder / 'grids'}")
