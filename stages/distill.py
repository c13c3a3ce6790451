"""Story two: teach a velocity model what the teacher answered, from the shards alone."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator

from configs.atomic import atomic_write
from configs.claim import refuse_claimed
from configs.load import save_resolved
from configs.strict import Location, Strict
from shards.manifest import Manifest
from shards.reader import Reader
from shards.view import View
from stages.cluster import device_of
from stages.evaluate.beside import GridConfig, grids_beside
from stages.export import export_all, files_of
from stages.export.courier import HubConfig, courier_of, sending
from stages.export.existing import refuse_occupied
from stages.nets.files import find
from stages.nets.graft import graft_time_embedding
from stages.nets.saved import Origin, load_teacher_parts
from stages.nets.student import Student, Target, vp_of
from stages.nets.teacher import Teacher
from stages.train.capacity import refuse_launch
from stages.train.checkpoint import Resume
from stages.train.david import DavidConfig, judge_of
from stages.train.hooks import Hooks
from stages.train.launch import is_launched, launch
from stages.train.loop import TrainConfig, fit
from stages.train.machine import Machine
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.start import PURPOSE, claimed_by_main, fetch_checkpoint, refuse_start
from stages.train.statistics import feature_scale
from stages.train.validation import Validation, ValidationConfig


class Config(Strict):
    """Distil RUN/cache into a velocity model; checkpoints, journal, grids and export go to RUN/distill."""

    run: Path = Field(description="run folder; reads RUN/cache, writes RUN/distill")
    teacher: Location | None = Field(
        None, description="where the teacher lies now, if it moved since the cache was made"
    )
    target: Target = Field(
        "velocity",
        description="velocity: of the straight path, told 1000 s; vp_v: v-prediction on the teacher's path, as the "
        "original experiment had it (exported for DDIM and its kin)",
    )
    graft: bool = Field(
        True, description="start from the closed-form graft of the time embedding; for target velocity alone"
    )
    view: View = Field(View(), description="which samples of the cache are learnt from; all unless told")
    train: TrainConfig = Field(TrainConfig(), description="how long, how fast, how often")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="terms of the loss")
    david: DavidConfig = Field(DavidConfig(), description="who judges the blocks, and what his word is worth")
    validation: ValidationConfig = Field(ValidationConfig(), description="states measured at each checkpoint")
    grid: GridConfig = Field(GridConfig(), description="pictures drawn at each checkpoint")
    hub: HubConfig = Field(HubConfig(), description="where the run is kept beyond this machine")
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    processes: int = Field(1, ge=1, description="processes that share each batch: one for each GPU, or core of a CPU")

    @model_validator(mode="after")
    def _graft_fits(self) -> "Config":
        if self.graft and self.target != "velocity":
            raise ValueError("graft is for target velocity: a vp_v student is told the teacher's own steps")
        return self


def run(config: Config) -> None:
    """Train from wherever the run was left, then export, in as many processes as asked for; nothing is done twice."""
    if config.processes == 1 or is_launched():
        machine = Machine(device_of(config.device), config.train.precision)
        with machine.one_refusal():
            distill(config, machine)
        return
    refuse_claimed(config.run / "distill", PURPOSE)
    _, teacher = find(Origin.of(Manifest.open(config.run / "cache"), config.teacher).places())
    refuse_launch(config.train, config.processes, device_of(config.device), teacher, config.run / "cache")
    launch(config, "distill", config.processes)


def distill(config: Config, machine: Machine) -> None:
    """What each process does: refuse what cannot be done; then train, and export."""
    cache, folder, device = config.run / "cache", config.run / "distill", machine.device
    seed, rank, world = config.train.seed, machine.rank, machine.world
    rows = machine.rows(config.train.batch_size, config.train.accumulate)
    machine.on_main(refuse_claimed, folder, PURPOSE)
    manifest = Manifest.open(cache)
    reader = Reader(cache, "train", seed, rows, view=config.view, rank=rank, world=world)
    held_out = Reader(cache, "validation", seed)
    origin = Origin.of(manifest, config.teacher, config.target)
    teacher = Teacher(load_teacher_parts(origin, device, torch.float32), origin.tail)

    machine.on_main(refuse_occupied, folder / "export", files_of(origin, origin.facts(teacher.parts, 0)))
    student = Student.from_teacher(teacher.parts.unet, vp_of(config.target, teacher.parts.schedule, origin.tail))
    left = graft_time_embedding(student.unet, teacher.bridge) if config.graft else None
    machine.say(
        f"student: time embedding grafted, relative error {left:.3f}" if config.graft else "student: a plain copy"
    )
    objective = Objective(config.objective, student.blocks, feature_scale(cache, config.objective.block_bins))
    identity = {
        "recipe": manifest.recipe.fingerprint(),
        "target": config.target,
        "graft": config.graft,
        "view": config.view.model_dump(mode="json"),
        "david": config.david.model_dump(mode="json"),
    }
    machine.on_main(refuse_start, student, objective, config.train, folder, machine, identity, config.resume)
    reader.batch(np.arange(1))  # a shard is read, and its content checked, when the first of it is asked for

    validation = Validation(config.validation, held_out, reader, teacher)
    machine.on_main(lambda: print(validation.announced(), flush=True))
    steps = teacher.parts.schedule.steps
    grids = grids_beside(teacher, config.grid, folder / "grids")
    hooks = Hooks(begin=partial(remember, config, origin), validate=validation, at_checkpoint=grids)
    with courier_of(config.hub, folder, machine.is_main) as courier, claimed_by_main(folder, machine):
        # Before David is fitted, for it may be another run's.
        machine.on_main(fetch_checkpoint, objective, config.train, folder, identity, config.resume, courier.fetch)
        judge = machine.main_first(judge_of, config.david, reader, student.blocks, folder, seed, device, steps)
        student = fit(
            student,
            objective,
            judge.batches,
            teacher.uncond,
            config.train,
            folder,
            machine=machine,
            identity=identity,
            hooks=replace(sending(hooks, courier), elsewhere=None),
            judge=judge,
            samples_per_epoch=reader.samples_per_epoch,
            resume=config.resume,
        )
        machine.say(judge.verdict())
        machine.on_main(finish, config, origin, teacher, student)
        courier.send_export(folder / "export")
        machine.close()


def remember(config: Config, origin: Origin) -> None:
    """Leave in the run folder all that it takes to do it again."""
    folder = config.run / "distill"
    save_resolved(config, folder / "config.yaml", "distill")
    origin.save(folder)


def finish(config: Config, origin: Origin, teacher: Teacher, student: Student) -> None:
    """Export the student, verified."""
    folder = config.run / "distill"
    facts = origin.facts(teacher.parts, config.train.samples)
    exported = export_all(student, teacher.parts.folder, folder / "export", facts)
    atomic_write(folder / "COMPLETE", f"{config.train.samples}\n")
    print(f"{', '.join(map(str, exported))}: written and verified; pictures in {folder / 'grids'}")
