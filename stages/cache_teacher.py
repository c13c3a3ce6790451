"""Story one: ask the teacher about many prompts, once, and keep its answers."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from configs.atomic import atomic_write
from configs.load import save_resolved
from configs.strict import Strict
from shards.table import write_table
from shards.writer import CacheWriter
from stages.cluster import Make, device_of, fill, tasks_of
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.plan import blank_record, measure, record_bytes, refuse_small_disk, watching
from stages.prompts import Prompt, PromptSource, Split, prompts, report, source_identity
from stages.targets import RenderConfig, make_records, recipe_of


class Config(Strict):
    """Render prompts with the frozen teacher and keep what it answered, in shards under RUN/cache."""

    run: Path = Field(description="run folder; the cache lies in RUN/cache")
    teacher: str = Field(description="diffusers folder or hub id of an SD-1.x model")
    prompts: PromptSource = Field(description="where the sentences come from")
    seed: int = Field(0, description="seed of the prompts and of their pictures")
    count: int = Field(2000, ge=1, description="prompts in the training split")
    validation_count: int = Field(100, ge=1, description="prompts held out for validation")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    plan: bool = Field(False, description="measure a few prompts, tell what the rest will cost, and make nothing")
    no_disk_check: bool = Field(False, description="start, and go on, even if the disk looks too small")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="precision of the teacher; with float16 its steps above k = 700 stay in float32"
    )
    compile: bool = Field(False, description="compile the teacher first: minutes at the start, faster from then on")


def run(config: Config) -> None:
    """Fill RUN/cache; what is there already is kept, and another recipe is refused."""
    folder = config.run / "cache"
    parts = load_components(config.teacher, device_of(config.device), torch.float32)
    teacher = Teacher(parts, config.render.tail, getattr(torch, config.dtype), compiled=config.compile)
    asked: dict[Split, list[Prompt]] = {
        "train": prompts(config.prompts, config.seed, "train", config.count),
        "validation": prompts(config.prompts, config.seed, "validation", config.validation_count),
    }
    source = source_identity(config.prompts, config.seed)
    told = report(config.prompts, [*asked["train"], *asked["validation"]], teacher.parts.tokenizer)
    print("\n".join(told.lines()))

    writer = CacheWriter(folder, recipe_of(teacher, config.render, source))
    make: Make = partial(make_records, teacher, config=config.render.states)
    tasks = tasks_of(asked, config.render.records_per_shard)
    to_make = sum(len(task.prompts) for task in tasks if not writer.finished(task.split, task.index, len(task.prompts)))
    if config.plan:
        cost = measure(make, asked["train"][: config.render.batch_size], to_make)
        print("\n".join(cost.lines(folder)))
        refuse_small_disk(folder, cost.bytes)
        return
    if not config.no_disk_check:
        each = record_bytes(blank_record(teacher, config.render.states.draws))
        refuse_small_disk(folder, each * to_make)
        make = watching(make, folder, each * config.render.records_per_shard)
    made = fill(writer, tasks, config.render.batch_size, make)
    write_table(folder)

    save_resolved(config, config.run / "cache.yaml", "cache_teacher")
    atomic_write(folder / "COMPLETE", f"{config.count + config.validation_count}\n")
    failed = len(writer.manifest.failures)
    print(f"{folder}: {made} shards made, {len(writer.manifest.shards)} in all, {failed} prompts failed")
