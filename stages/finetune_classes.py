"""Story three: classes that matter are painted by the teacher and studied again, without forgetting the rest."""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ImportString, model_validator

from configs.atomic import atomic_write
from configs.load import save_resolved
from configs.strict import Strict
from shards.reader import Reader
from shards.writer import CacheWriter
from stages.classes import (
    OUTSIDE,
    PICTURES,
    ClassFile,
    class_prompts,
    draw_weights,
    identity,
    load_classes,
    outside_prompts,
    prior_weights,
    quotas,
)
from stages.cluster import device_of, fill, refuse_surplus, tasks_of
from stages.evaluate.per_class import ExamConfig, save_table, show_table
from stages.evaluate.watch import Watch
from stages.export import export_all
from stages.nets.saved import Origin, load_student, load_teacher_parts, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource, Split
from stages.targets import RenderConfig, make_records, recipe_of
from stages.train.checkpoint import Resume
from stages.train.launch import is_launched, launch
from stages.train.loop import TrainConfig, fit
from stages.train.machine import Machine
from stages.train.mixture import PRIOR_SHARE, Groups, Mixture, rows_of
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.statistics import feature_scale
from stages.train.stop import StopConfig


class Config(Strict):
    """Fine-tune RUN/distill on the classes of a class file; everything goes to RUN/classes."""

    run: Path = Field(description="run folder; reads RUN/cache and RUN/distill, writes RUN/classes")
    teacher: str | None = Field(None, description="where the teacher lies now, if it moved since the cache was made")
    classes: Path = Field(description="YAML file: classes with name, pattern and priority (top, mid, low)")
    prompts: PromptSource = Field(description="where the sentences of the classes come from")
    seed: int = Field(1, description="seed of the prompts and of their pictures")
    count: int = Field(PICTURES, ge=1, description="pictures in all, shared among the classes by priority")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    prior_share: float = Field(
        PRIOR_SHARE, gt=0, lt=1, description="share of each batch that comes from the distillation cache"
    )
    train: TrainConfig = Field(TrainConfig(), description="how long, how fast, how often")
    objective: ObjectiveConfig = Field(ObjectiveConfig(block_weight=0), description="terms of the loss")
    scorer: ImportString[Any] | None = Field(None, description="function (texts, pictures) -> scores, for the table")
    exam: ExamConfig = Field(ExamConfig(), description="how each class is measured: before, at checkpoints and after")
    stop: StopConfig | None = Field(
        None, description="end when classes gain no more or others lose, and take the best checkpoint; none: the last"
    )
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    processes: int = Field(1, ge=1, description="processes that share each batch: one for each GPU, or core of a CPU")

    @model_validator(mode="after")
    def _counts_losses(self) -> "Config":
        if self.stop is not None and self.stop.most_lost is not None and self.scorer is None:
            raise ValueError(
                "stop.most_lost counts right pictures, and there is no scorer - name one, or set it to null"
            )
        return self


def run(config: Config) -> None:
    """Paint, study, measure and export, in as many processes as asked for; what is finished already is kept."""
    if config.processes > 1 and not is_launched():
        launch(config, "finetune_classes", config.processes, device_of(config.device))
    else:
        finetune(config)


def finetune(config: Config) -> None:
    """What each process does."""
    machine = Machine(device_of(config.device), config.train.precision)
    machine.rows(config.train.batch_size, config.train.accumulate)
    folder, device = config.run / "classes", machine.device
    saved = open_run(config.run / "distill")
    origin = saved.origin.at(config.teacher)
    teacher = Teacher(load_teacher_parts(origin, device, torch.float32), origin.tail)
    classes = load_classes(config.classes)

    asked = machine.on_main(exam_prompts, config, classes)
    machine.on_main(paint, config, folder / "cache", teacher, classes)
    machine.on_main(remember, config, origin)

    distilled = partial(load_student, saved, teacher.parts)
    weights = {spec.name: classes.weight(spec) for spec in classes.classes}
    watch = Watch(teacher, distilled, asked, weights, config.scorer, config.exam, config.stop, folder)
    student = study(config, machine, teacher, classes, distilled(), saved.weights, watch)
    machine.on_main(finish, config, origin, teacher, classes, watch, student)
    machine.close()


def finish(
    config: Config, origin: Origin, teacher: Teacher, classes: ClassFile, watch: Watch, student: Student
) -> None:
    """Measure each class before and after, and export the student, verified."""
    folder = config.run / "classes"
    samples = watch.best(config.train.max_samples)
    if config.stop is not None:
        print(f"{folder}: its best checkpoint is that after {samples} samples")
        student = load_student(open_run(folder, samples), teacher.parts)
    results = watch.results(student)
    save_table(classes, results, folder / "per_class.csv")
    show_table(classes, results)

    facts = origin.facts(teacher.parts, samples)
    facts |= {"classes": {spec.name: spec.priority for spec in classes.classes}}
    exported = export_all(student, teacher.parts.folder, folder / "export", facts)
    atomic_write(folder / "COMPLETE", f"{samples}\n")
    print(f"{', '.join(map(str, exported))}: written and read back; table in {folder / 'per_class.csv'}")


def paint(config: Config, cache: Path, teacher: Teacher, classes: ClassFile) -> None:
    """Let the teacher paint each class's quota of prompts, as records like those of story one."""
    pictures = quotas(classes, config.count)
    found = class_prompts(config.prompts, config.seed, "train", classes, pictures)
    for spec in classes.classes:
        share = f"{100 * classes.weight(spec):.0f} % of the draws"
        print(f"class {spec.name}: {spec.priority}, {pictures[spec.name]} pictures, {share}")

    prompts: dict[Split, list[Prompt]] = {"train": [prompt for listed in found.values() for prompt in listed]}
    source = identity(config.prompts, config.seed, classes, config.count)
    writer = CacheWriter(cache, recipe_of(teacher, config.render, source))
    make = partial(make_records, teacher, config=config.render.states)
    tasks = tasks_of(prompts, config.render.records_per_shard)
    refuse_surplus(writer, tasks)
    fill(writer, tasks, config.render.batch_size, make)


def remember(config: Config, origin: Origin) -> None:
    """Leave beside the classes' cache all that it takes to make it again."""
    folder = config.run / "classes"
    save_resolved(config, folder / "config.yaml", "finetune_classes")
    atomic_write(folder / "classes.yaml", config.classes.read_text(encoding="utf-8"))
    origin.save(folder)


def repaint(config: Config, origin: Origin) -> None:
    """Paint what is missing of the classes' cache, with the teacher that painted the rest."""
    teacher = Teacher(load_teacher_parts(origin, device_of(config.device), torch.float32), origin.tail)
    paint(config, config.run / "classes" / "cache", teacher, load_classes(config.classes))


def study(
    config: Config,
    machine: Machine,
    teacher: Teacher,
    classes: ClassFile,
    student: Student,
    start: Path,
    watch: Watch,
) -> Student:
    """Train on batches of class pictures, weighted by priority, and of the distillation cache."""
    folder = config.run / "classes"
    in_classes, in_prior = rows_of(config.train.batch_size, config.prior_share)
    painted = Reader(folder / "cache", "train")
    records = Counter(painted.class_names())
    weights = draw_weights(classes, records)
    prior = prior_weights(classes, Reader(config.run / "cache", "train").class_names)
    seed = config.train.seed
    mixture = Mixture(
        classes=Reader(folder / "cache", "train", seed, in_classes, class_weights=weights),
        prior=Reader(config.run / "cache", "train", seed, in_prior, class_weights=prior),
        rank=machine.rank,
        world=machine.world,
        groups=Groups.of_classes(classes, records),
    )
    return fit(
        student.requires_grad_(True),
        Objective(config.objective, student.blocks, feature_scale(config.run / "cache", config.objective.block_bins)),
        mixture.batches,
        teacher.uncond,
        config.train,
        folder,
        machine=machine,
        identity={
            "recipe": painted.manifest.recipe.fingerprint(),
            "prior": mixture.prior.manifest.recipe.fingerprint(),
            "prior_share": config.prior_share,
            "start": hashlib.sha256(start.read_bytes()).hexdigest(),
            **({"exam": config.exam.model_dump(mode="json", exclude={"pictures"})} if config.stop else {}),
        },
        groups=mixture.groups.names,
        resume=config.resume,
        hooks=watch.hooks(),
    )


def exam_prompts(config: Config, classes: ClassFile) -> dict[str, list[Prompt]]:
    """Prompts of each class that no training saw, and prompts outside of all classes where there are any."""
    pictures = config.exam.pictures
    asked = {spec.name: pictures for spec in classes.classes}
    found = class_prompts(config.prompts, config.seed, "validation", classes, asked)
    outside = outside_prompts(config.prompts, config.seed, "validation", classes, pictures)
    return {**found, OUTSIDE: outside} if outside else found
