"""Story one: ask the teacher about many prompts, once, and keep its answers."""

import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from configs.atomic import atomic_write
from configs.load import save_resolved
from configs.refusal import Refused
from configs.strict import Location, Strict
from shards.claims import Claims
from shards.recipe import Recipe, differences
from shards.table import is_tabulated, write_table
from shards.writer import CacheWriter
from stages.cluster import (
    HERE,
    WHERE,
    Job,
    Make,
    Task,
    device_of,
    fill,
    fill_by_many,
    ranges,
    refuse_ray_without_library,
    refuse_surplus,
    starter,
    stopping,
    tasks_in,
    tasks_of,
)
from stages.memory import refuse_too_many
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.plan import blank_record, forecast, places_here, record_bytes, refuse_small_disk, watching
from stages.prompts import Prompt, PromptSource, Split, prompts, report, source_identity
from stages.targets import RenderConfig, make_records, recipe_in, recipe_of
from stages.threads import one_thread

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
        pattern=WHERE,
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
    def alone(self) -> bool:
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
    teacher = load_teacher(config, device_of(config.device if config.alone or config.plan else "cpu"))
    told = report(config.prompts, [*asked["train"], *asked["validation"]], teacher.parts.tokenizer)
    print("\n".join(told.lines()))

    source = source_identity(config.prompts, config.seed)
    before = recipe_in(config.run / "cache")
    recipe = recipe_of(teacher, config.render, source, device_of(config.device), before)
    writer = CacheWriter(config.run / "cache", recipe)
    refuse_surplus(writer, whole)
    if config.plan:
        tell_cost(config, writer, tasks, teacher, asked["train"][: config.render.batch_size])
        return
    if config.cluster == HERE and config.workers > 1:
        refuse_too_many("workers", config.workers, teacher_bytes(teacher), device_of(config.device))
    with stopping(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        made = make_shards(config, writer, tasks, teacher)
        finish(config, writer, whole, made)


def load_teacher(config: Config, device: torch.device) -> Teacher:
    """The frozen teacher, on this device."""
    parts = load_components(config.teacher, device, torch.float32)
    return Teacher(parts, config.render.tail, getattr(torch, config.dtype), compiled=config.compile)


def tell_cost(
    config: Config, writer: CacheWriter, tasks: Sequence[Task], teacher: Teacher, sample: Sequence[Prompt]
) -> None:
    """Print what the missing shards will take; raises `Refused` when the disk cannot hold it."""
    make = partial(make_records, teacher, config=config.render.states)
    sizes = [len(task.prompts) for task in unfinished(writer, tasks)]
    places = places_here() if config.cluster == HERE else config.workers
    with one_thread():
        cost = forecast(make, sample, sizes, config.workers, places)
    print("\n".join(cost.lines(writer.folder)))
    refuse_small_disk(writer.folder, cost.bytes)


def teacher_bytes(teacher: Teacher) -> int:
    """What the teacher's parts take of memory."""
    parts = (teacher.parts.unet, teacher.parts.vae, teacher.parts.text_encoder)
    return sum(value.nbytes for part in parts for value in part.parameters())


def make_shards(config: Config, writer: CacheWriter, tasks: Sequence[Task], teacher: Teacher) -> int:
    """Make the missing shards, here or by workers; returns how many were made."""
    to_make = sum(len(task.prompts) for task in unfinished(writer, tasks))
    each = record_bytes(blank_record(teacher, config.render.states.draws))
    if not config.no_disk_check:
        refuse_small_disk(writer.folder, each * to_make)
    start = starter(config.cluster, config.workers)  # raises `Refused` where it cannot reach them
    if to_make:
        (writer.folder / MARK).unlink(missing_ok=True)
    if config.alone:
        return fill(writer, tasks, config.render.batch_size, maker(config, teacher, each))
    opened = partial(open_worker, from_anywhere(config), writer.manifest.recipe, each)
    return fill_by_many(writer, Job(opened, tasks, config.render.batch_size), each, start)


def from_anywhere(config: Config) -> Config:
    """The same in words that do not depend on the folder where a process was started."""
    places: dict[str, Path | str] = {"run": config.run.absolute()}
    if Path(config.teacher).is_dir():
        places["teacher"] = str(Path(config.teacher).absolute())
    return config.model_copy(update=places)


def maker(config: Config, teacher: Teacher, record_bytes: int) -> Make:
    """What makes records, and keeps an eye on the disk."""
    make = partial(make_records, teacher, config=config.render.states)
    if config.no_disk_check:
        return make
    return watching(make, config.run / "cache", record_bytes * config.render.records_per_shard)


def open_worker(config: Config, recipe: Recipe, record_bytes: int, number: int) -> tuple[CacheWriter, Make]:
    """The cache and the teacher, opened by worker `number`; raises `Refused` when it finds another teacher there."""
    teacher = load_teacher(config, device_of(config.device, number))
    source = recipe.identity["prompts"]
    found = recipe_of(teacher, config.render, source if isinstance(source, dict) else {}, before=recipe)
    if slips := differences(recipe, found):
        raise Refused(f"worker {number} would make another cache: {'; '.join(slips)} - give it the same files")
    return CacheWriter(config.run / "cache", recipe), maker(config, teacher, record_bytes)


def finish(config: Config, writer: CacheWriter, whole: Sequence[Task], made: int) -> None:
    """Write the table and the mark if every shard is there; else say what is missing."""
    writer.refresh()
    folder, held = writer.folder, writer.manifest
    missing = {task.name for task in unfinished(writer, whole)}
    left = [number for number, task in enumerate(whole) if task.name in missing]
    if left:
        print(
            f"{folder}: {made} shards made, {len(left)} of {len(whole)} are still missing: {ranges(left)} - "
            "the same command makes them with such a --shard-range, or all without one"
        )
        return
    with Claims(folder) as claims:  # others may have found it finished at the same moment
        while not claims.take("table"):
            time.sleep(POLL_SECONDS)
        if not is_tabulated(folder):
            write_table(folder)
        # Where it was made is not what it is: whoever repairs it does so alone.
        made_so = config.model_copy(update={"workers": 1, "cluster": HERE, "shard_range": None})
        save_resolved(made_so, config.run / "cache.yaml", "cache_teacher")
        atomic_write(folder / MARK, f"{config.count + config.validation_count}\n")
    print(f"{folder}: {made} shards made, {len(held.shards)} in all, {len(held.failures)} prompts failed")


def unfinished(writer: CacheWriter, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that are still to be done, as far as the sizes of the files tell."""
    return [task for task in tasks if not writer.finished(task.split, task.index, len(task.prompts))]
