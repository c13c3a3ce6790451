"""The cache of the classes' pictures: its shards by size, their records, and the batches that they give."""

from collections import Counter
from functools import partial
from pathlib import Path

from shards.reader import Reader
from shards.writer import CacheWriter
from stages.cache.fill import ShardTask, fill, refuse_surplus, tasks_of
from stages.cache.sizes import RenderSizes
from stages.cache.targets import RenderConfig
from stages.classes.ledger import Ledger
from stages.classes.mixture import BatchSplit, DataTarget, Mixture, class_numbers
from stages.classes.pictures import PicturePlan, picture_record_maker, size_of_picture
from stages.classes.selection import prior_sampling_weights, sampling_weights
from stages.classes.specification import ClassFile
from stages.flow.timesteps import TimestepDensity
from stages.nets.teacher import Teacher
from stages.train.runtime import Runtime


def class_tasks(render: RenderConfig, teacher: Teacher, plan: PicturePlan) -> list[ShardTask]:
    """The shards of the classes' cache."""
    sizes = RenderSizes.checked(render.sizes, teacher.components.latents)
    size_of = partial(size_of_picture, sizes=sizes)
    return tasks_of({"train": plan.prompts}, render.records_per_shard, render.batch_size, sizes, size_of)


def open_class_cache(
    run: Path, render: RenderConfig, teacher: Teacher, plan: PicturePlan
) -> tuple[CacheWriter, list[ShardTask]]:
    """RUN/classes/cache and its shards; raises `Refused` where it holds others."""
    writer = CacheWriter(run / "classes" / "cache", plan.recipe)
    tasks = class_tasks(render, teacher, plan)
    refuse_surplus(writer, tasks)
    return writer, tasks


def fill_class_cache(run: Path, render: RenderConfig, teacher: Teacher, plan: PicturePlan, fit_steps: int) -> None:
    """Make the missing records of pictures; those from RUN/cache are copied."""
    writer, tasks = open_class_cache(run, render, teacher, plan)
    fill(writer, tasks, picture_record_maker(teacher, run / "cache", render.states, fit_steps))


def make_mixture(
    run: Path,
    classes: ClassFile,
    ledger: Ledger,
    teacher: Teacher,
    split: BatchSplit,
    photograph_guidance: float,
    density: TimestepDensity,
    seed: int,
    runtime: Runtime,
) -> Mixture:
    """The batches of the kept pictures and of RUN/cache, the prior; `split` gives the rows of both at each size."""
    cache, prior_cache, native = run / "classes" / "cache", run / "cache", teacher.components.native_size
    reader = Reader(cache, "train", unstated_size=native)
    kept, data_keys = set(ledger.usable_keys()), set(ledger.usable_keys("data"))
    guidance = dict.fromkeys(ledger.usable_keys("data", "photograph"), photograph_guidance)
    counts = Counter(head.class_name for head in reader.headers() if head.key in kept)
    own = (record for record in reader.records() if record.key in data_keys)
    prior = prior_sampling_weights(classes, Reader(prior_cache, "train").class_names)
    weights = sampling_weights(classes, counts)
    return Mixture(
        classes=Reader(cache, "train", seed, keys=kept, class_weights=weights, unstated_size=native),
        prior=Reader(prior_cache, "train", seed, class_weights=prior, unstated_size=native),
        rows=split,
        class_names=tuple(spec.name for spec in classes.classes),
        class_numbers=class_numbers(classes, counts),
        data_target=DataTarget.from_records(own, guidance, seed, density) if data_keys else None,
        rank=runtime.rank,
        world=runtime.world,
    )
