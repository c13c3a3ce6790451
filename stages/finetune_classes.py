"""Story three: classes that matter are painted by the teacher and studied again, without forgetting the rest."""

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ImportString

from configs.atomic import atomic_write
from configs.load import save_resolved
from configs.strict import Strict
from shards.reader import Reader
from shards.writer import CacheWriter
from stages.classes import (
    PICTURES,
    ClassFile,
    class_prompts,
    draw_weights,
    identity,
    load_classes,
    prior_weights,
    quotas,
)
from stages.cluster import device_of, fill, refuse_surplus, tasks_of
from stages.evaluate.beside import GridConfig, grids_beside
from stages.evaluate.per_class import ExamConfig, examine, save_table, show_table
from stages.export import export_all
from stages.nets.saved import Origin, load_student, load_teacher_parts, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource, Split
from stages.targets import RenderConfig, make_records, recipe_of
from stages.train.checkpoint import Resume
from stages.train.loop import TrainConfig, fit
from stages.train.mixture import PRIOR_SHARE, Mixture, rows_of
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.statistics import feature_scale


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
    grid: GridConfig = Field(GridConfig(), description="pictures drawn at each checkpoint")
    scorer: ImportString[Any] | None = Field(None, description="function (texts, pictures) -> scores, for the table")
    exam: ExamConfig = Field(ExamConfig(), description="how each class is measured before and after")
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")


def run(config: Config) -> None:
    """Paint, study, measure and export; what is finished already is kept."""
    folder, device = config.run / "classes", device_of(config.device)
    saved = open_run(config.run / "distill")
    origin = saved.origin.at(config.teacher)
    teacher = Teacher(load_teacher_parts(origin, device, torch.float32), origin.tail)
    classes = load_classes(config.classes)

    paint(config, folder / "cache", teacher, classes)
    remember(config, origin)

    distilled = load_student(saved, teacher.parts)
    student = study(config, folder, teacher, classes, load_student(saved, teacher.parts), saved.weights)

    asked = exam_prompts(config, classes)
    results = {
        name: examine(model, teacher, asked, config.scorer, config.exam)
        for name, model in (("before", distilled), ("after", student))
    }
    save_table(classes, results, folder / "per_class.csv")
    show_table(classes, results)

    facts = origin.facts(teacher.parts, config.train.max_samples)
    facts |= {"classes": {spec.name: spec.priority for spec in classes.classes}}
    exported = export_all(student, teacher.parts.folder, folder / "export", facts)
    atomic_write(folder / "COMPLETE", f"{config.train.max_samples}\n")
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


def study(config: Config, folder: Path, teacher: Teacher, classes: ClassFile, student: Student, start: Path) -> Student:
    """Train on batches of class pictures, weighted by priority, and of the distillation cache."""
    in_classes, in_prior = rows_of(config.train.batch_size, config.prior_share)
    painted = Reader(folder / "cache", "train")
    weights = draw_weights(classes, Counter(painted.class_names()))
    prior = prior_weights(classes, Reader(config.run / "cache", "train").class_names)
    seed = config.train.seed
    mixture = Mixture(
        classes=Reader(folder / "cache", "train", seed, in_classes, class_weights=weights),
        prior=Reader(config.run / "cache", "train", seed, in_prior, class_weights=prior),
    )
    return fit(
        student.requires_grad_(True),
        Objective(config.objective, student.blocks, feature_scale(config.run / "cache", config.objective.block_bins)),
        mixture.batches,
        teacher.uncond,
        config.train,
        folder,
        grids_beside(teacher, config.grid, folder / "grids"),
        device=device_of(config.device),
        identity={
            "recipe": painted.manifest.recipe.fingerprint(),
            "prior": mixture.prior.manifest.recipe.fingerprint(),
            "prior_share": config.prior_share,
            "start": hashlib.sha256(start.read_bytes()).hexdigest(),
        },
        resume=config.resume,
    )


def exam_prompts(config: Config, classes: ClassFile) -> dict[str, list[Prompt]]:
    """Prompts of each class that no training saw."""
    asked = {spec.name: config.exam.pictures for spec in classes.classes}
    return class_prompts(config.prompts, config.seed, "validation", classes, asked)
