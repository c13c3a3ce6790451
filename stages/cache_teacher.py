"""The command `sollune cache-teacher`: render prompts with the teacher once, and store the states as shards."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from configs.load import resolved_yaml
from configs.values import PictureSize
from shards.journal import JOURNAL_FOLDER
from shards.manifest import Recipe, differences
from shards.record import Record
from shards.table import write_table
from shards.verify import COMPLETE_FILE
from shards.writer import CacheWriter
from stages.cache.claims import Claims
from stages.cache.engines import CLUSTER_PATTERN, HERE, refuse_ray_without_library, worker_starter
from stages.cache.fill import (
    POLL_SECONDS,
    FillJob,
    RecordMaker,
    ShardTask,
    fill,
    ranges,
    refuse_surplus,
    tasks_in,
    tasks_of,
    unfinished_tasks,
)
from stages.cache.finished import CACHE_CONFIG, complete_text, is_finished, take_finished
from stages.cache.fleet import fill_by_many
from stages.cache.plan import Cost, blank_record, estimate_cost, record_bytes, refuse_small_disk
from stages.cache.sizes import RenderSizes
from stages.cache.targets import RenderConfig, make_records, recipe_in, recipe_of, refuse_other_windows
from stages.nets.components import Components, load_components
from stages.nets.measured_teacher import MeasuredTeacher, load_measured_teacher
from stages.nets.teacher import Teacher, last_low_precision_step
from stages.prompts import Prompt, PromptSource, Split, prompts, source_identity, source_report
from stages.scale.fleet import CachingWork, FleetOptions
from stages.scale.operations import pass_operations
from stages.scale.rates import BRANCHES
from stages.system.atomic import atomic_write
from stages.system.device import device_of, one_thread
from stages.system.memory import refuse_too_many
from stages.system.refusal import Refused
from stages.system.signals import interrupt_on
from stages.system.storage.mirror import bring_folder, send_folder
from stages.teacher_files.open import open_teacher_files
from stages.teacher_files.source import TeacherSource


class Config(FleetOptions):
    """Render prompts with the frozen teacher and store its states and velocities in shards under RUN/cache."""

    run: Path = Field(description="run folder; the cache lies in RUN/cache")
    teacher: TeacherSource = Field(description="the model that is converted: a folder, a hub id, or a single file")
    prompts: PromptSource = Field(description="where the sentences come from")
    seed: int = Field(0, description="seed of the prompts and of their pictures")
    count: int = Field(2000, ge=1, description="prompts in the training split")
    validation_count: int = Field(100, ge=1, description="prompts held out for validation")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one, each worker the next")
    workers: int = Field(1, ge=1, description="processes that make shards, each with a teacher and one CPU thread")
    cluster: str = Field(
        HERE,
        pattern=CLUSTER_PATTERN,
        description="where they run: here, ray (a Ray of this machine) or ray:ADDRESS; all see RUN under the same path",
    )
    shard_range: str | None = Field(
        None, description="FIRST:END makes only these shards, counted from 0 through the splits; machines share RUN so"
    )
    no_disk_check: bool = Field(False, description="start, and go on, even if the disk looks too small")
    dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="precision of the teacher; with float16 the steps where errors count most stay in float32 "
        "(k > 700 of Stable Diffusion's 1000)",
    )
    compile: bool = Field(False, description="compile the teacher first: minutes at the start, faster from then on")

    @property
    def in_process(self) -> bool:
        """Whether this process makes the shards."""
        return self.workers == 1 and self.cluster == HERE


@dataclass(frozen=True)
class CacheJob:
    """A cache that can be made: settings, teacher and shards; nothing is written yet."""

    config: Config
    writer: CacheWriter
    teacher: Teacher
    all_tasks: Sequence[ShardTask]
    tasks: Sequence[ShardTask]
    """Those of `config.shard_range`."""


def run(config: Config) -> None:
    """Fill RUN/cache; finished shards are kept, and another recipe is refused."""
    fleet = config.fleet()
    job = open_job(config)
    if fleet is not None:
        print("\n".join(caching_work(job).lines(fleet)))
    elif config.plan:
        print_cost(job)
    else:
        make_cache(job)


def open_job(config: Config, opened: MeasuredTeacher | None = None) -> CacheJob:
    """Open prompts, teacher (unless it is given) and folder, and print what is notable about them.

    Raises `Refused` for what cannot be made, and for a folder that holds another cache.
    """
    refuse_ray_without_library(config.cluster)
    by_split: dict[Split, list[Prompt]] = {
        "train": prompts(config.prompts, config.seed, "train", config.count),
        "validation": prompts(config.prompts, config.seed, "validation", config.validation_count),
    }
    if opened is None:
        # Many workers load a teacher each; the one here then gives sizes only, and takes no memory of a GPU.
        device = device_of(config.device if config.in_process or config.plan else "cpu")
        opened = load_measured_teacher(config.teacher, device)
    print("\n".join(opened.used.lines))
    folder = config.run / "cache"
    existing = recipe_in(folder)
    # Workers need no measurement, and nothing that follows from what is there already.
    config = config.model_copy(update={"teacher": opened.source, "render": config.render.with_windows(existing)})
    teacher = make_teacher(config, opened.components)
    render = config.render
    sizes = RenderSizes.checked(render.sizes, teacher.components.latents)
    all_tasks = tasks_of(by_split, render.records_per_shard, render.batch_size, sizes)
    tasks = tasks_in(all_tasks, config.shard_range)
    report = source_report(config.prompts, [*by_split["train"], *by_split["validation"]], teacher.components.tokenizer)
    print("\n".join(report.lines()))

    source = source_identity(config.prompts, config.seed)
    recipe = recipe_of(teacher, render, source, device_of(config.device), existing)
    if existing is not None:
        refuse_other_windows(folder, existing, recipe)
    writer = CacheWriter(folder, recipe)
    refuse_surplus(writer, all_tasks)
    return CacheJob(config, writer, teacher, all_tasks, tasks)


def make_cache(job: CacheJob) -> None:
    """Make the missing shards of a cache, then its table; raises `Refused` where memory or disk are too small."""
    config = job.config
    refuse_too_small_machine(job)
    with interrupt_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        made = make_shards(job)
        finish(config, job.writer, job.all_tasks, made)


def refuse_too_small_machine(job: CacheJob) -> None:
    """Raise `Refused` unless the teacher of each worker fits into memory, and the missing shards on the disk."""
    config, teacher = job.config, job.teacher
    if config.cluster == HERE and config.workers > 1:
        parts = (teacher.components.unet, teacher.components.vae, teacher.components.text_encoder)
        teacher_bytes = sum(value.nbytes for part in parts for value in part.parameters())
        refuse_too_many("workers", config.workers, teacher_bytes, device_of(config.device))
    if not config.no_disk_check:
        each, to_make = record_bytes_by_size(job), unfinished_tasks(job.writer, job.tasks)
        refuse_small_disk(job.writer.folder, sum(each[task.size] * len(task.prompts) for task in to_make))


def record_bytes_by_size(job: CacheJob) -> dict[PictureSize, int]:
    """Bytes of a record of each size, in its shard and in the table."""
    states = job.config.render.states
    sizes, count = {task.size for task in job.tasks}, states.states_per_prompt
    return {size: record_bytes(blank_record(job.teacher, count, size, states.windows)) for size in sizes}


def load_teacher(config: Config, device: torch.device) -> Teacher:
    """The frozen teacher, on this device, without the lines about its files: the main process prints them."""
    return make_teacher(config, load_components(open_teacher_files(config.teacher), device, torch.float32))


def make_teacher(config: Config, parts: Components) -> Teacher:
    """The frozen teacher of these parts."""
    return Teacher(parts, config.render.tail, getattr(torch, config.dtype), compiled=config.compile)


def print_cost(job: CacheJob) -> None:
    """Print the cost of the missing shards; raises `Refused` when the disk cannot hold it."""
    cost = cost_of(job)
    print("\n".join(cost.lines(job.writer.folder)))
    refuse_small_disk(job.writer.folder, cost.bytes)


def caching_work(job: CacheJob) -> CachingWork:
    """The missing shards in counted operations; the later steps of a lower precision are in full precision."""
    each, states, bridge = record_bytes_by_size(job), job.config.render.states, job.teacher.bridge
    calls = BRANCHES * (states.steps + states.renoised_states)
    operations = {size: calls * pass_operations(job.teacher, size) for size in each}
    low = 0.0 if job.config.dtype == "float32" else (last_low_precision_step(bridge) + 1) / len(bridge.s_table)
    tasks = unfinished_tasks(job.writer, job.tasks)
    return CachingWork([(len(t.prompts), operations[t.size], each[t.size]) for t in tasks], 1 - low)


def cost_of(job: CacheJob) -> Cost:
    """The cost of the missing shards, measured on the first prompts."""
    config, states = job.config, job.config.render.states
    capacity = (torch.cuda.device_count() or os.cpu_count() or 1) if config.cluster == HERE else config.workers
    with one_thread():
        return estimate_cost(
            lambda prompts, keys, size: make_records(job.teacher, prompts, keys, states, size),
            unfinished_tasks(job.writer, job.tasks),
            config.workers,
            capacity,
        )


def make_shards(job: CacheJob) -> int:
    """Make the missing shards, here or by workers; returns how many were made."""
    config, writer, tasks = job.config, job.writer, job.tasks
    each = record_bytes_by_size(job)
    start = worker_starter(config.cluster, config.workers)  # raises `Refused` where they cannot run
    if unfinished_tasks(writer, tasks):
        (writer.folder / COMPLETE_FILE).unlink(missing_ok=True)
    if config.in_process:
        return fill(writer, tasks, record_maker(config, job.teacher, each))
    open_numbered = partial(open_worker, with_absolute_paths(config), writer.manifest.recipe, each)
    return fill_by_many(writer, FillJob(open_numbered, tasks), each, start)


def with_absolute_paths(config: Config) -> Config:
    """The same with paths that do not depend on the working directory of a process."""
    return config.model_copy(update={"run": config.run.absolute(), "teacher": config.teacher.absolute()})


def record_maker(config: Config, teacher: Teacher, record_bytes_of: Mapping[PictureSize, int]) -> RecordMaker:
    """`make_records` of this teacher; each batch is refused unless the disk can still hold a shard."""

    def make(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if not config.no_disk_check:
            refuse_small_disk(config.run / "cache", record_bytes_of[size] * config.render.records_per_shard)
        return make_records(teacher, prompts, keys, config.render.states, size)

    return make


def open_worker(
    config: Config, recipe: Recipe, record_bytes_of: Mapping[PictureSize, int], number: int
) -> tuple[CacheWriter, RecordMaker]:
    """The cache and the teacher, opened by worker `number`; raises `Refused` when the teacher there is another one."""
    teacher = load_teacher(config, device_of(config.device, number))
    source = recipe.identity["prompts"]
    own = recipe_of(teacher, config.render, source if isinstance(source, dict) else {}, existing=recipe)
    if changes := differences(recipe, own):
        raise Refused(f"worker {number} would make another cache: {'; '.join(changes)} - give it the same files")
    return CacheWriter(config.run / "cache", recipe), record_maker(config, teacher, record_bytes_of)


def finish(config: Config, writer: CacheWriter, all_tasks: Sequence[ShardTask], made_count: int) -> None:
    """Write the table and `COMPLETE` if every shard is there; else print which are missing."""
    bring_folder(writer.folder / JOURNAL_FOLDER)
    writer.refresh()
    folder = writer.folder
    missing = [number for number, task in enumerate(all_tasks) if not writer.is_finished(*task.shard)]
    if missing:
        print(
            f"{folder}: {made_count} shards made, {len(missing)} of {len(all_tasks)} are still missing: "
            f"{ranges(missing)} - the same command makes them with such a --shard-range, or all without one"
        )
        return
    prompts = config.count + config.validation_count
    with Claims(folder) as claims:  # other processes may finish at the same moment
        while not claims.acquire("table"):
            time.sleep(POLL_SECONDS)
        writer.refresh()
        if not take_finished(config.run, writer.manifest, prompts):
            if not is_finished(folder, writer.manifest):
                writer.rebuild_manifest()
                write_table(folder)
            # The workers are no part of what the cache is: a repair runs in one process.
            alone = config.model_copy(update={"workers": 1, "cluster": HERE, "shard_range": None})
            atomic_write(config.run / CACHE_CONFIG, resolved_yaml(alone, "cache_teacher"))
            atomic_write(folder / COMPLETE_FILE, complete_text(prompts))
            send_folder(config.run)  # who waits for the claim takes it from there
        claims.release("table")
    manifest = writer.manifest
    print(f"{folder}: {made_count} shards made, {len(manifest.shards)} in all, {len(manifest.failures)} prompts failed")
