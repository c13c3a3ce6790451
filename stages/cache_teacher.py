"""Story one: ask the teacher about many prompts, once, and keep its answers."""

import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from configs.load import resolved_yaml
from configs.values import Location, Strict
from shards.manifest import Recipe, differences
from shards.table import is_tabulated, write_table
from shards.writer import CacheWriter
from stages.cache.claims import Claims
from stages.cache.engines import CLUSTER_PATTERN, HERE, refuse_ray_without_library, worker_starter
from stages.cache.fill import FillJob, RecordMaker, ShardTask, fill, ranges, refuse_surplus, tasks_in, tasks_of
from stages.cache.fleet import fill_by_many
from stages.cache.plan import (
    blank_record,
    estimate_cost,
    record_bytes,
    refuse_small_disk,
    with_disk_check,
    worker_capacity,
)
from stages.cache.targets import RenderConfig, make_records, recipe_in, recipe_of
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource, Split, prompts, source_identity, source_report
from stages.system.atomic import atomic_write
from stages.system.device import device_of, one_thread
from stages.system.memory import refuse_too_many
from stages.system.refusal import Refused
from stages.system.signals import interrupt_on

MARK = "COMPLETE"
POLL_SECONDS = 0.5


class Config(Strict):
    """Render prompts with the frozen teacher and keep what it answered, in shards under RUN/cache."""

    run: Path = Field(description="run folder; the cache lies in RUN/cache")
    teacher: Location = Field(description="diffusers folder or hub id of an SD-1.x model")
    prompts: PromptSource = Field(description="where the sentences come from")
    seed: int = Field(0, description="seed of the prompts and of their pictures")
    count: int = Field(2000, ge=1, description="prompts in the training split")
    validation_count: int = Field(100, ge=1, description="prompts held out for validation")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one, each worker the next")
    workers: int = Field(
        1, ge=1, description="processes that make shards, each with a teacher and one thread of the CPU"
    )
    cluster: str = Field(
        HERE,
        pattern=CLUSTER_PATTERN,
        description="where they run: here, ray (a Ray of this machine) or ray:ADDRESS; all see RUN under the same path",
    )
    shard_range: str | None = Field(
        None, description="FIRST:END makes only these shards, counted from 0 through the splits; machines share RUN so"
    )
    plan: bool = Field(False, description="measure a few prompts, tell what the rest will cost, and make nothing")
    no_disk_check: bool = Field(False, description="start, and go on, even if the disk looks too small")
    dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="precision of the teacher; with float16 the steps where errors count most stay in float32 "
        "(k > 700 of Stable Diffusion's 1000)",
    )
    compile: bool = Field(False, description="compile the teacher first: minutes at the start, faster from then on")

    @property
    def in_process(self) -> bool:
        """Whether this very process makes the shards."""
        return self.workers == 1 and self.cluster == HERE


def run(config: Config) -> None:
    """Fill RUN/cache; what is there already is kept, and another recipe is refused."""
    refuse_ray_without_library(config.cluster)
    asked: dict[Split, list[Prompt]] = {
        "train": prompts(config.prompts, config.seed, "train", config.count),
        "validation": prompts(config.prompts, config.seed, "validation", config.validation_count),
    }
    whole = tasks_of(asked, config.render.records_per_shard)
    tasks = tasks_in(whole, config.shard_range)
    # Many workers load a teacher each; the one here is then only looked at, and takes no room on a GPU.
    teacher = load_teacher(config, device_of(config.device if config.in_process or config.plan else "cpu"))
    told = source_report(config.prompts, [*asked["train"], *asked["validation"]], teacher.components.tokenizer)
    print("\n".join(told.lines()))

    source = source_identity(config.prompts, config.seed)
    before = recipe_in(config.run / "cache")
    recipe = recipe_of(teacher, config.render, source, device_of(config.device), before)
    writer = CacheWriter(config.run / "cache", recipe)
    refuse_surplus(writer, whole)
    if config.plan:
        print_cost(config, writer, tasks, teacher, asked["train"][: config.render.batch_size])
        return
    if config.cluster == HERE and config.workers > 1:
        refuse_too_many("workers", config.workers, teacher_bytes(teacher), device_of(config.device))
    with interrupt_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        made = make_shards(config, writer, tasks, teacher)
        finish(config, writer, whole, made)


def load_teacher(config: Config, device: torch.device) -> Teacher:
    """The frozen teacher, on this device."""
    parts = load_components(config.teacher, device, torch.float32)
    return Teacher(parts, config.render.tail, getattr(torch, config.dtype), compiled=config.compile)


def print_cost(
    config: Config, writer: CacheWriter, tasks: Sequence[ShardTask], teacher: Teacher, sample: Sequence[Prompt]
) -> None:
    """Print what the missing shards will take; raises `Refused` when the disk cannot hold it."""
    make = partial(make_records, teacher, config=config.render.states)
    sizes = [len(task.prompts) for task in unfinished_tasks(writer, tasks)]
    places = worker_capacity() if config.cluster == HERE else config.workers
    with one_thread():
        cost = estimate_cost(make, sample, sizes, config.workers, places)
    print("\n".join(cost.lines(writer.folder)))
    refuse_small_disk(writer.folder, cost.bytes)


def teacher_bytes(teacher: Teacher) -> int:
    """What the teacher's parts take of memory."""
    parts = (teacher.components.unet, teacher.components.vae, teacher.components.text_encoder)
    return sum(value.nbytes for part in parts for value in part.parameters())


def make_shards(config: Config, writer: CacheWriter, tasks: Sequence[ShardTask], teacher: Teacher) -> int:
    """Make the missing shards, here or by workers; returns how many were made."""
    to_make = sum(len(task.prompts) for task in unfinished_tasks(writer, tasks))
    each = record_bytes(blank_record(teacher, config.render.states.states_per_prompt))
    if not config.no_disk_check:
        refuse_small_disk(writer.folder, each * to_make)
    start = worker_starter(config.cluster, config.workers)  # raises `Refused` where it cannot reach them
    if to_make:
        (writer.folder / MARK).unlink(missing_ok=True)
    if config.in_process:
        return fill(writer, tasks, config.render.batch_size, record_maker(config, teacher, each))
    opened = partial(open_worker, with_absolute_paths(config), writer.manifest.recipe, each)
    return fill_by_many(writer, FillJob(opened, tasks, config.render.batch_size), each, start)


def with_absolute_paths(config: Config) -> Config:
    """The same in words that do not depend on the folder where a process was started."""
    places: dict[str, Path | str] = {"run": config.run.absolute()}
    if Path(config.teacher).is_dir():
        places["teacher"] = str(Path(config.teacher).absolute())
    return config.model_copy(update=places)


def record_maker(config: Config, teacher: Teacher, bytes_per_record: int) -> RecordMaker:
    """What makes records, and keeps an eye on the disk."""
    make = partial(make_records, teacher, config=config.render.states)
    if config.no_disk_check:
        return make
    return with_disk_check(make, config.run / "cache", bytes_per_record * config.render.records_per_shard)


def open_worker(config: Config, recipe: Recipe, bytes_per_record: int, number: int) -> tuple[CacheWriter, RecordMaker]:
    """The cache and the teacher, opened by worker `number`; raises `Refused` when it finds another teacher there."""
    teacher = load_teacher(config, device_of(config.device, number))
    source = recipe.identity["prompts"]
    found = recipe_of(teacher, config.render, source if isinstance(source, dict) else {}, existing=recipe)
    if slips := differences(recipe, found):
        raise Refused(f"worker {number} would make another cache: {'; '.join(slips)} - give it the same files")
    return CacheWriter(config.run / "cache", recipe), record_maker(config, teacher, bytes_per_record)


def finish(config: Config, writer: CacheWriter, all_tasks: Sequence[ShardTask], made_count: int) -> None:
    """Write the table and the mark if every shard is there; else say what is missing."""
    writer.refresh()
    folder, held = writer.folder, writer.manifest
    missing = {task.name for task in unfinished_tasks(writer, all_tasks)}
    left = [number for number, task in enumerate(all_tasks) if task.name in missing]
    if left:
        print(
            f"{folder}: {made_count} shards made, {len(left)} of {len(all_tasks)} are still missing: {ranges(left)} - "
            "the same command makes them with such a --shard-range, or all without one"
        )
        return
    with Claims(folder) as claims:  # others may have found it finished at the same moment
        while not claims.acquire("table"):
            time.sleep(POLL_SECONDS)
        if not is_tabulated(folder):
            write_table(folder)
        # Where it was made is not what it is: whoever repairs it does so alone.
        made_so = config.model_copy(update={"workers": 1, "cluster": HERE, "shard_range": None})
        atomic_write(config.run / "cache.yaml", resolved_yaml(made_so, "cache_teacher"))
        atomic_write(folder / MARK, f"{config.count + config.validation_count}\n")
    print(f"{folder}: {made_count} shards made, {len(held.shards)} in all, {len(held.failures)} prompts failed")


def unfinished_tasks(writer: CacheWriter, tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """The tasks that are still to be done, as far as the sizes of the files tell."""
    return [task for task in tasks if not writer.is_finished(task.split, task.index, len(task.prompts))]
