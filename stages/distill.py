"""`sollune distill`: train a velocity model on the teacher's cached predictions."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator

from configs.load import resolved_yaml
from configs.values import Strict
from shards.manifest import Manifest
from shards.reader import Reader
from shards.stream.view import View
from stages.david.fusion import PUBLISHED_BLOCK_WEIGHTS
from stages.export import export_all, export_paths
from stages.export.existing import refuse_occupied
from stages.hub.uploader import HubConfig, make_uploader, with_upload_hooks
from stages.nets.graft import graft_time_embedding
from stages.nets.run_folder import Origin, load_run_teacher
from stages.nets.student import Student, Target, make_vp_bridge
from stages.nets.teacher import Teacher
from stages.sampling.grids import GridConfig, comparison_grid_hook
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.ownership import refuse_claimed
from stages.teacher_files.recorded import find_teacher
from stages.teacher_files.source import TeacherMove
from stages.train.block_weighter import DavidConfig, make_block_weighter
from stages.train.checkpoint import Resume
from stages.train.loop import Hooks, fit
from stages.train.objective import Objective, ObjectiveConfig, feature_scale
from stages.train.runtime import Runtime, is_launched, launch
from stages.train.setup import (
    CLAIM_PURPOSE,
    TrainConfig,
    claim_on_main,
    refuse_launch,
    refuse_start,
    refuse_uneven_batches,
    rows_text,
    run_checkpoints,
    training_sizes,
)
from stages.train.validation import Validation, ValidationConfig


class Config(Strict):
    """Distil RUN/cache into a velocity model; checkpoints, journal, grids and export go to RUN/distill."""

    run: Path = Field(description="run folder; reads RUN/cache, writes RUN/distill")
    teacher: TeacherMove | None = Field(
        None, description="where the teacher lies now, if it moved since the cache was made"
    )
    target: Target = Field(
        "velocity",
        description="velocity: of the straight path, time input 1000 s; vp_v: v-prediction on the teacher's path, as "
        "in the original experiment (exported for DDIM and related schedulers)",
    )
    graft: bool = Field(
        True, description="start from the closed-form graft of the time embedding; for target velocity alone"
    )
    view: View = Field(View(), description="which samples of the cache are trained on; all by default")
    train: TrainConfig = Field(TrainConfig(), description="how long, how fast, how often")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="terms of the loss")
    david: DavidConfig = Field(DavidConfig(), description="the assessor of the blocks, and its influence on the loss")
    validation: ValidationConfig = Field(ValidationConfig(), description="states measured at each checkpoint")
    grid: GridConfig = Field(GridConfig(), description="comparison grid generated at each checkpoint")
    hub: HubConfig = Field(HubConfig(), description="where the run is uploaded to")
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    processes: int = Field(1, ge=1, description="processes that share each batch: one for each GPU, or core of a CPU")

    @model_validator(mode="after")
    def _check_graft_target(self) -> "Config":
        if self.graft and self.target != "velocity":
            raise ValueError("graft is for target velocity: a vp_v student takes the teacher's own steps")
        return self


def run(config: Config) -> None:
    """Train from the last checkpoint on, then export, in `processes` processes; finished work is not repeated."""
    if config.processes == 1 or is_launched():
        runtime = Runtime(device_of(config.device), config.train.precision)
        with runtime.report_refusal_once():
            distill(config, runtime)
        return
    refuse_claimed(config.run / "distill", CLAIM_PURPOSE)
    origin = Origin.from_manifest(Manifest.open(config.run / "cache"), config.teacher)
    teacher = find_teacher(origin.teacher_sources()).folder
    cache = config.run / "cache"
    sizes = [config.view.size] if config.view.size else training_sizes(cache, teacher)
    refuse_launch(config.train, config.processes, device_of(config.device), teacher, cache, sizes=sizes)
    launch(config, "distill", config.processes)


def distill(config: Config, runtime: Runtime) -> None:
    """The work of each process: refuse what cannot be done, then train and export."""
    cache, folder, device = config.run / "cache", config.run / "distill", runtime.device
    seed, rank, world = config.train.seed, runtime.rank, runtime.world
    refuse_uneven_batches(config.train, runtime)
    runtime.on_main(refuse_claimed, folder, CLAIM_PURPOSE)
    manifest = Manifest.open(cache)
    origin = Origin.from_manifest(manifest, config.teacher, config.target)
    if config.view.size:
        origin = replace(origin, sizes=(str(config.view.size),))
    teacher = Teacher(load_run_teacher(origin, device, torch.float32), origin.tail)
    native, rows = teacher.components.native_size, max(1, config.train.batch_size // world)
    reader = Reader(
        cache,
        "train",
        seed,
        rows,
        batch_pixels=config.train.batch_pixels,
        view=config.view,
        rank=rank,
        world=world,
        unstated_size=native,
    )
    sizes = [size for size in reader.sizes if size is not None]
    refuse_uneven_batches(config.train, runtime, sizes)
    held_out = Reader(cache, "validation", seed, unstated_size=native)
    last_sample = reader.schedule.boundary(config.train.max_samples)
    schedule = teacher.components.schedule
    exported = export_paths(origin, origin.export_facts(teacher.components, 0))
    runtime.on_main(refuse_occupied, folder / "export", exported)

    student = Student.from_teacher(teacher.components.unet, make_vp_bridge(config.target, schedule, origin.tail))
    error = graft_time_embedding(student.unet, teacher.bridge) if config.graft else None
    runtime.print_on_main(
        f"student: time embedding grafted, relative error {error:.3f}" if config.graft else "student: a plain copy"
    )
    scale = feature_scale(cache, config.objective.block_bins)
    objective = Objective(config.objective, student.blocks, scale, PUBLISHED_BLOCK_WEIGHTS)
    identity = {
        "recipe": manifest.recipe.fingerprint(),
        "target": config.target,
        "graft": config.graft,
        "view": config.view.model_dump(mode="json", exclude=None if config.view.size else {"size"}),
        "david": config.david.model_dump(mode="json"),
    }
    runtime.on_main(refuse_start, student, objective, config.train, folder, runtime, identity, config.resume)
    if len(sizes) > 1 or config.train.batch_pixels:
        runtime.print_on_main(f"batches: {rows_text({size: reader.rows_of(size) for size in sizes})}")
    reader.batch(np.arange(1))  # the content of a shard is checked when its first record is read

    validation = Validation(config.validation, held_out, reader, teacher)
    runtime.on_main(lambda: print(validation.summary(), flush=True))
    grids = comparison_grid_hook(
        teacher, config.grid, folder / "grids", origin.learnt_sizes(teacher.components.native_size)
    )
    hooks = Hooks(on_start=partial(save_settings, config, origin), validate=validation, on_checkpoint=grids)
    with make_uploader(config.hub, folder, runtime.is_main) as uploader, claim_on_main(folder, runtime):
        # Before David is fitted, because the checkpoint may be another run's.
        checkpoints = run_checkpoints(folder, config.train, objective, identity)
        runtime.on_main(checkpoints.fetch, uploader.fetch_checkpoint, config.resume)
        weights = objective.block_weights
        weighter = runtime.main_first(
            make_block_weighter, config.david, reader, weights, folder, device, schedule.steps
        )
        sampler = weighter.timestep_sampler
        student = fit(
            student,
            objective,
            partial(sampler.batches, stream=reader.batches) if sampler else reader.batches,
            teacher.uncond,
            config.train,
            folder,
            runtime=runtime,
            identity=identity,
            hooks=replace(with_upload_hooks(hooks, uploader), fetch_checkpoint=None),
            block_weighter=weighter,
            samples_per_epoch=reader.samples_per_epoch,
            last_sample=last_sample,
            sizes=sizes,
            resume=config.resume,
        )
        runtime.print_on_main(weighter.summary())
        runtime.on_main(export_student, config, origin, teacher, student, last_sample)
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
