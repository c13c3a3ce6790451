"""Story three: classes that matter are painted by the teacher and studied again, without forgetting the rest."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ImportString, JsonValue, model_validator

from configs.atomic import atomic_write
from configs.claim import refuse_claimed
from configs.load import save_resolved
from configs.strict import Location, Strict
from shards.manifest import Manifest
from shards.reader import Reader
from shards.recipe import Recipe
from shards.writer import CacheWriter
from stages.classes import (
    PICTURES,
    ClassFile,
    draw_weights,
    identity,
    load_classes,
    prior_weights,
)
from stages.cluster import Task, device_of, fill, refuse_surplus, tasks_of
from stages.evaluate.asked import exam_prompts
from stages.evaluate.gate import GateConfig, judge, scorer_of, told
from stages.evaluate.metrics import Scorer
from stages.evaluate.per_class import ExamConfig, save_table, show_table
from stages.evaluate.watch import Watch
from stages.export import export_all, export_lora, files_of
from stages.export.courier import HubConfig, courier_of, sending
from stages.export.existing import refuse_occupied
from stages.nets.files import find
from stages.nets.lora import LoraConfig, merged, with_adapters
from stages.nets.saved import Origin, keep_base, load_student, load_teacher_parts, open_run, refuse_other_base
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.pictures import Ledger, PicturesConfig, Wanted, make_pictures, wanted
from stages.prompts import PromptSource
from stages.targets import RenderConfig, recipe_in, recipe_of
from stages.train.capacity import refuse_launch
from stages.train.checkpoint import Resume
from stages.train.data_target import DataTarget
from stages.train.hooks import Hooks
from stages.train.launch import is_launched, launch
from stages.train.loop import TrainConfig, fit
from stages.train.machine import Machine
from stages.train.mixture import PRIOR_SHARE, Groups, Mixture, rows_of
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.start import PURPOSE, claimed_by_main, refuse_start
from stages.train.statement import sha256
from stages.train.statistics import feature_scale
from stages.train.stop import StopConfig


class Config(Strict):
    """Fine-tune RUN/distill on the classes of a class file; everything goes to RUN/classes."""

    run: Path = Field(description="run folder; reads RUN/cache and RUN/distill, writes RUN/classes")
    teacher: Location | None = Field(
        None, description="where the teacher lies now, if it moved since the cache was made"
    )
    classes: Path = Field(description="YAML file of the classes; `sollune classes show FILE` tells what it means")
    prompts: PromptSource = Field(description="where the sentences of the classes come from")
    seed: int = Field(1, description="seed of the prompts and of their pictures")
    count: int = Field(PICTURES, ge=1, description="pictures in all, shared among the classes by priority")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    pictures: PicturesConfig = Field(PicturesConfig(), description="where they come from, and what they teach")
    gate: GateConfig = Field(GateConfig(), description="which pictures are set aside")
    prior_share: float = Field(
        PRIOR_SHARE, gt=0, lt=1, description="share of each batch that comes from the distillation cache"
    )
    train: TrainConfig = Field(TrainConfig(), description="how long, how fast, how often")
    objective: ObjectiveConfig = Field(ObjectiveConfig(block_weight=0), description="terms of the loss")
    lora: LoraConfig | None = Field(None, description="train adapters beside the weights instead of these; none: all")
    scorer: ImportString[Any] | None = Field(
        None,
        description="function (texts, pictures) -> attribute -> shown or not, for gate, exams and table; none compares "
        "with the teacher only",
    )
    exam: ExamConfig = Field(ExamConfig(), description="how each class is measured: before, at checkpoints and after")
    stop: StopConfig | None = Field(
        None, description="end when classes gain no more or others lose, and take the best checkpoint; none: the last"
    )
    hub: HubConfig = Field(HubConfig(), description="where the run is kept beyond this machine")
    resume: Resume = Field("auto", description="auto: from the newest whole checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    processes: int = Field(1, ge=1, description="processes that share each batch: one for each GPU, or core of a CPU")

    @model_validator(mode="after")
    def _can_be_measured_and_taught(self) -> "Config":
        if self.stop is not None and self.stop.most_lost is not None and self.scorer is None:
            raise ValueError("stop.most_lost counts right pictures - name a scorer, or set it to null")
        self.pictures.refuse_hardly_guided(self.render.states.guidance_min)
        return self


def run(config: Config) -> None:
    """Paint, study, measure and export, in as many processes as asked for; what is finished already is kept."""
    if config.processes == 1 or is_launched():
        machine = Machine(device_of(config.device), config.train.precision)
        with machine.one_refusal():
            finetune(config, machine)
        return
    refuse_claimed(config.run / "classes", PURPOSE)
    _, teacher = find(open_run(config.run / "distill").origin.at(config.teacher).places())
    few, device = config.lora is not None, device_of(config.device)
    refuse_launch(config.train, config.processes, device, teacher, config.run / "cache", adapters_only=few)
    launch(config, "finetune_classes", config.processes)


def finetune(config: Config, machine: Machine) -> None:
    """What each process does: refuse what cannot be done; then paint, train, measure and export."""
    machine.rows(config.train.batch_size, config.train.accumulate)
    rows_of(config.train.batch_size, config.prior_share)
    folder, device = config.run / "classes", machine.device
    machine.on_main(refuse_claimed, folder, PURPOSE)
    saved = open_run(config.run / "distill")
    origin = saved.origin.at(config.teacher).adapted(config.lora)
    teacher = Teacher(load_teacher_parts(origin, device, torch.float32), origin.tail)
    classes, class_file = load_classes(config.classes), config.classes.read_bytes()

    facts = origin.facts(teacher.parts, 0) | {"classes": [spec.name for spec in classes.classes]}
    machine.on_main(refuse_occupied, folder / "export", files_of(origin, facts))
    distilled = partial(load_student, saved, teacher.parts)
    asked = machine.on_main(exam_prompts, config.prompts, config.seed, classes, config.exam.pictures)
    student = distilled()
    machine.on_main(refuse_other_base, folder, origin, student)
    student = with_adapters(student, config.lora) if config.lora else student.requires_grad_(True)
    cache = config.run / "cache"
    objective = Objective(config.objective, student.blocks, feature_scale(cache, config.objective.block_bins))
    listed = machine.on_main(listing, config, teacher, classes)
    Reader(cache, "train").batch(np.arange(1))  # a shard's content is checked when it is first read

    def refuse_run(ledger: Ledger | None) -> None:
        """What an earlier run in the folder was may not change; what pictures decide is known once they are judged."""
        known = identity_of(config, listed.recipe, saved.weights, ledger)
        unsettled = () if ledger else ("pictures", "guidance")
        refuse_start(student, objective, config.train, folder, machine, known, config.resume, unsettled)

    machine.on_main(refuse_run, None)
    # Without a scorer all is measured against the teacher, who cannot draw what photographs alone show.
    weights = {spec.name: classes.weight(spec) for spec in classes.classes if config.scorer or spec.is_painted}
    watch = Watch(teacher, distilled, asked, weights, config.scorer, config.exam, config.stop, folder)
    scorers: list[Scorer | None] = []
    machine.on_main(lambda: scorers.append(scorer_of(config.gate, config.scorer, device)))

    def begin() -> None:
        """What the run leaves of itself before its first step."""
        if config.lora:
            keep_base(folder, origin, distilled())
        remember(config, origin, class_file)

    with courier_of(config.hub, folder, machine.is_main) as courier, claimed_by_main(folder, machine):
        machine.on_main(lambda: prepare(config, teacher, listed, scorers[0], refuse_run))
        hooks = replace(sending(watch.hooks(), courier), begin=begin)
        student = merged(study(config, machine, teacher, classes, student, objective, saved.weights, hooks))
        machine.on_main(finish, config, origin, teacher, classes, watch, student)
        courier.send_export(folder / "export")
        machine.close()


def finish(
    config: Config, origin: Origin, teacher: Teacher, classes: ClassFile, watch: Watch, student: Student
) -> None:
    """Measure each class before and after, and export the student, verified."""
    folder = config.run / "classes"
    samples = watch.best(config.train.samples)
    if config.stop is not None:
        print(f"{folder}: its best checkpoint is that after {samples} samples")
        student = load_student(open_run(folder, samples), teacher.parts)
    results = watch.results(student)
    save_table(classes, results, folder / "per_class.csv")
    show_table(classes, results)

    exported = export_all(student, teacher.parts.folder, folder / "export", origin.facts(teacher.parts, samples))
    exported += export_lora(open_run(folder, samples), folder / "export")
    atomic_write(folder / "COMPLETE", f"{samples}\n")
    print(f"{', '.join(map(str, exported))}: written and verified; table in {folder / 'per_class.csv'}")


def listing(config: Config, teacher: Teacher, classes: ClassFile) -> Wanted:
    """Which pictures the classes get, and from where; raises `Refused` where that cannot be, and writes nothing."""
    distilled = config.run / "cache"
    prior_weights(classes, Reader(distilled, "train").class_names)
    source, cache = identity(config.prompts, config.seed, classes, config.count), config.run / "classes" / "cache"
    recipe = recipe_of(teacher, config.render, source, before=recipe_in(cache))
    listed = wanted(classes, config.prompts, config.seed, config.count, config.pictures, distilled, recipe)
    for line in listed.truncation_lines(teacher.parts.tokenizer):
        print(line)
    counts = listed.counts()
    for spec in classes.classes:
        pictures = ", ".join(f"{count} {source}" for (name, source), count in counts.items() if name == spec.name)
        print(
            f"class {spec.name}: {spec.priority}, {100 * classes.weight(spec):.0f} % of the draws, pictures: {pictures}"
        )
    opened(config, listed)
    return listed


def opened(config: Config, listed: Wanted) -> tuple[CacheWriter, list[Task]]:
    """The classes' cache and its shards; raises `Refused` where it holds others."""
    writer = CacheWriter(config.run / "classes" / "cache", listed.recipe)
    tasks = tasks_of({"train": listed.prompts}, config.render.records_per_shard)
    refuse_surplus(writer, tasks)
    return writer, tasks


def prepare(
    config: Config, teacher: Teacher, listed: Wanted, scorer: Scorer | None, accept: Callable[[Ledger], None]
) -> None:
    """Make what is missing of the pictures, and write down which of them are used: pictures.json, set_aside.png."""
    paint(config, teacher, listed)
    print(told(judge(config.run / "classes", listed, teacher, scorer, config.gate, config.pictures, accept)))


def paint(config: Config, teacher: Teacher, listed: Wanted) -> None:
    """Make the records of all pictures of the classes, like those of story one."""
    writer, tasks = opened(config, listed)
    make = make_pictures(teacher, config.run / "cache", config.render.states, config.pictures.fit_steps)
    fill(writer, tasks, config.render.batch_size, make)


def remember(config: Config, origin: Origin, class_file: bytes | None = None) -> None:
    """Leave beside the classes' cache all that it takes to make it again; the class file as it was when it was read."""
    folder = config.run / "classes"
    save_resolved(config, folder / "config.yaml", "finetune_classes")
    atomic_write(folder / "classes.yaml", config.classes.read_bytes() if class_file is None else class_file)
    origin.save(folder)


def repaint(config: Config, origin: Origin) -> None:
    """Paint what is missing of the classes' cache, with the teacher that painted the rest."""
    teacher = Teacher(load_teacher_parts(origin, device_of(config.device), torch.float32), origin.tail)
    paint(config, teacher, listing(config, teacher, load_classes(config.classes)))


def study(
    config: Config,
    machine: Machine,
    teacher: Teacher,
    classes: ClassFile,
    student: Student,
    objective: Objective,
    start: Path,
    hooks: Hooks,
) -> Student:
    """Train on batches of class pictures, weighted by priority, and of the distillation cache."""
    folder = config.run / "classes"
    ledger = Ledger.open(folder)
    mixture = mixture_of(config, machine, classes, ledger)
    return fit(
        student,
        objective,
        mixture.batches,
        teacher.uncond,
        config.train,
        folder,
        machine=machine,
        identity=identity_of(config, mixture.classes.manifest.recipe, start, ledger),
        groups=mixture.groups.names,
        resume=config.resume,
        hooks=hooks,
    )


def identity_of(config: Config, recipe: Recipe, start: Path, ledger: Ledger | None) -> dict[str, JsonValue]:
    """What the weights depend on beyond the training's own settings; without a ledger, as far as it is known."""
    return {
        "recipe": recipe.fingerprint(),
        "pictures": ledger.sha256() if ledger else "",
        "prior": Manifest.open(config.run / "cache").recipe.fingerprint(),
        "prior_share": config.prior_share,
        "start": sha256(start),
        **({"exam": config.exam.model_dump(mode="json", exclude={"pictures"})} if config.stop else {}),
        **({"guidance": config.pictures.guidance} if ledger and ledger.kept("data", "photograph") else {}),
        **({"lora": config.lora.model_dump(mode="json")} if config.lora else {}),
    }


def mixture_of(config: Config, machine: Machine, classes: ClassFile, ledger: Ledger) -> Mixture:
    """The stream of the pictures that are kept, and of the distillation cache."""
    seed, (in_classes, in_prior) = config.train.seed, rows_of(config.train.batch_size, config.prior_share)
    cache, painted = config.run / "classes" / "cache", Reader(config.run / "classes" / "cache", "train")
    kept, taught = set(ledger.kept()), set(ledger.kept("data"))
    shown = dict.fromkeys(ledger.kept("data", "photograph"), config.pictures.guidance)
    records = Counter(head.class_name for head in painted.heads() if head.key in kept)
    own = (record for record in painted.records() if record.key in taught)
    prior = prior_weights(classes, Reader(config.run / "cache", "train").class_names)
    return Mixture(
        classes=Reader(cache, "train", seed, in_classes, keys=kept, class_weights=draw_weights(classes, records)),
        prior=Reader(config.run / "cache", "train", seed, in_prior, class_weights=prior),
        groups=Groups.of_classes(classes, records),
        data=DataTarget.of(own, shown, seed, config.render.states.density) if taught else None,
        rank=machine.rank,
        world=machine.world,
    )
