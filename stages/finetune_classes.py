"""`sollune finetune-classes`: generate pictures of the classes and train on them, without forgetting the rest."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ImportString, JsonValue, model_validator

from configs.load import resolved_yaml
from configs.values import PictureSize, Strict
from shards.manifest import Manifest, Recipe
from shards.reader import Reader
from stages.cache.sizes import RenderSizes
from stages.cache.targets import RenderConfig, recipe_in, recipe_of, refuse_windows, training_shares
from stages.classes.class_cache import class_tasks, fill_class_cache, make_mixture, open_class_cache
from stages.classes.exam import ExamConfig, exam_prompts, save_table, show_table
from stages.classes.gate import GateConfig, apply_gate, select_scorer, summary_line
from stages.classes.ledger import Ledger
from stages.classes.mixture import (
    DEFAULT_PRIOR_SHARE,
    refuse_missing_sizes,
    split_batch_size,
)
from stages.classes.monitor import ClassMonitor, StopConfig
from stages.classes.pictures import (
    PicturePlan,
    PicturesConfig,
    plan_pictures,
)
from stages.classes.selection import DEFAULT_PICTURES, prior_sampling_weights, prompts_identity
from stages.classes.specification import ClassFile, load_classes
from stages.evaluate.metrics import Scorer
from stages.export import export_all, export_lora, export_paths
from stages.export.existing import refuse_occupied
from stages.hub.uploader import HubConfig, make_uploader, with_upload_hooks
from stages.nets.lora import LoraConfig, add_adapters, merge_adapters
from stages.nets.run_folder import Origin, load_run_teacher, load_student, open_run, refuse_other_base, save_base
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource
from stages.sampling.few_steps import refuse_few_steps
from stages.system.atomic import atomic_write
from stages.system.device import device_of
from stages.system.disk import file_sha256
from stages.system.ownership import refuse_claimed
from stages.teacher_files.recorded import find_teacher
from stages.teacher_files.source import TeacherMove
from stages.train.checkpoint import Resume
from stages.train.loop import fit
from stages.train.objective import Objective, ObjectiveConfig, feature_scale
from stages.train.runtime import Runtime, is_launched, launch
from stages.train.setup import (
    CLAIM_PURPOSE,
    TrainConfig,
    claim_on_main,
    refuse_launch,
    refuse_start,
    refuse_uneven_batches,
)


class Config(Strict):
    """Fine-tune RUN/distill on the classes of a class file; everything goes to RUN/classes."""

    run: Path = Field(description="run folder; reads RUN/cache and RUN/distill, writes RUN/classes")
    teacher: TeacherMove | None = Field(
        None, description="where the teacher is now, if it moved since the cache was made"
    )
    classes: Path = Field(description="YAML file of the classes; `sollune classes show FILE` prints its plan")
    prompts: PromptSource = Field(description="where the sentences of the classes come from")
    seed: int = Field(1, description="seed of the prompts and of their pictures")
    count: int = Field(DEFAULT_PICTURES, ge=1, description="pictures in all, shared among the classes by priority")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    pictures: PicturesConfig = Field(PicturesConfig(), description="where they come from, and their targets")
    gate: GateConfig = Field(GateConfig(), description="which pictures are set aside")
    prior_share: float = Field(DEFAULT_PRIOR_SHARE, gt=0, lt=1, description="share of RUN/cache in each batch")
    train: TrainConfig = Field(TrainConfig(), description="how long, how fast, how often")
    objective: ObjectiveConfig = Field(ObjectiveConfig(block_weight=0), description="terms of the loss")
    lora: LoraConfig | None = Field(None, description="train adapters beside the weights instead of these; none: all")
    scorer: ImportString[Any] | None = Field(
        None, description="function (texts, pictures) -> attribute -> shown or not; none: compare with the teacher only"
    )
    exam: ExamConfig = Field(ExamConfig(), description="how each class is measured: before, at checkpoints and after")
    stop: StopConfig | None = Field(
        None, description="end when classes gain no more or others lose, at the best checkpoint; none: the last"
    )
    hub: HubConfig = Field(HubConfig(), description="repository to which the run is uploaded")
    resume: Resume = Field("auto", description="auto: from the newest intact checkpoint; never: refuse a run's folder")
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
    processes: int = Field(1, ge=1, description="processes that share each batch: one for each GPU, or core of a CPU")

    @model_validator(mode="after")
    def _check_scorer_and_rendering(self) -> "Config":
        if self.stop is not None and self.stop.most_lost is not None and self.scorer is None:
            raise ValueError("stop.most_lost counts right pictures - name a scorer, or set it to null")
        if self.objective.needs_x0:
            raise ValueError(
                "objective.velocity_target data is for distill: here pictures.painted and pictures.reused say which "
                "pictures are targets - leave it out"
            )
        refuse_windows(self.render.states)
        self.pictures.refuse_low_guidance(self.render.states.guidance_min)
        return self


def run(config: Config) -> None:
    """Generate, train, measure and export, in `config.processes` processes; finished work is kept."""
    if config.processes == 1 or is_launched():
        runtime = Runtime(device_of(config.device), config.train.precision)
        with runtime.report_refusal_once():
            finetune(config, runtime)
        return
    refuse_claimed(config.run / "classes", CLAIM_PURPOSE)
    teacher = find_teacher(
        open_run(config.run / "distill").origin.with_teacher(config.teacher).teacher_sources()
    ).folder
    few, device = config.lora is not None, device_of(config.device)
    refuse_launch(config.train, config.processes, device, teacher, config.run / "cache", adapters_only=few)
    launch(config, "finetune_classes", config.processes)


def finetune(config: Config, runtime: Runtime) -> None:
    """The work of each process: refuse what is impossible; then generate, train, measure and export."""
    config = with_cache_sizes(config)
    refuse_uneven_batches(config.train, runtime)
    if config.train.batch_pixels is None:
        split_batch_size(config.train.batch_size, config.prior_share)
    cache, folder, device = config.run / "cache", config.run / "classes", runtime.device
    runtime.on_main(refuse_claimed, folder, CLAIM_PURPOSE)
    saved = open_run(config.run / "distill")
    refuse_few_steps(saved, "the training of classes")
    origin = saved.origin.with_teacher(config.teacher).with_lora(config.lora)
    teacher = Teacher(load_run_teacher(origin, device, torch.float32), origin.tail)
    classes, class_file = load_classes(config.classes), config.classes.read_bytes()

    facts = origin.export_facts(teacher.components, 0) | {"classes": [spec.name for spec in classes.classes]}
    runtime.on_main(refuse_occupied, folder / "export", export_paths(origin, facts))
    load_distilled = partial(load_student, saved, teacher.components)
    prompts = runtime.on_main(exam_prompts, config.prompts, config.seed, classes, config.exam.pictures)
    student = load_distilled()
    runtime.on_main(refuse_other_base, folder, origin, student)
    student = add_adapters(student, config.lora) if config.lora else student.requires_grad_(True)
    objective = Objective(config.objective, student.blocks, feature_scale(cache, config.objective.block_bins))
    plan = runtime.on_main(plan_class_pictures, config, teacher, classes)
    refuse_sizes(config, runtime, teacher, plan)
    Reader(cache, "train").batch(np.arange(1))  # the content of a shard is checked at its first read

    def check_run(ledger: Ledger | None) -> None:
        """Refuse a run folder of other settings; those that depend on the pictures are known only with the ledger."""
        identity = classes_run_identity(config, plan.recipe, saved.weights, ledger)
        unknown = () if ledger else ("pictures", "guidance")
        refuse_start(student, objective, config.train, folder, runtime, identity, config.resume, unknown)

    runtime.on_main(check_run, None)
    # Without a scorer all is measured against the teacher, which does not know what photographs alone show.
    weights = {spec.name: classes.sampling_share(spec) for spec in classes.classes if config.scorer or spec.has_prompts}
    sizes = RenderSizes.checked(config.render.sizes, teacher.components.latents).by_frequency
    monitor = ClassMonitor(
        teacher, load_distilled, prompts, weights, config.scorer, config.exam, config.stop, folder, sizes
    )
    scorers: list[Scorer | None] = []  # on the main process alone, since models are not broadcast
    runtime.on_main(lambda: scorers.append(select_scorer(config.gate, config.scorer, device)))

    def split(size: PictureSize | None) -> tuple[int, int]:
        return split_batch_size(config.train.rows_of(size or teacher.components.native_size), config.prior_share)

    def make_pictures() -> None:
        fill_class_cache(config.run, config.render, teacher, plan, config.pictures.fit_steps)
        print(summary_line(apply_gate(folder, plan, teacher, scorers[0], config.gate, config.pictures, check_run)))

    def save_run_files() -> None:
        if config.lora:
            save_base(folder, origin, load_distilled())
        save_settings(config, origin, class_file)

    with make_uploader(config.hub, folder, runtime.is_main) as uploader, claim_on_main(folder, runtime):
        runtime.on_main(make_pictures)
        ledger = Ledger.open(folder)
        guidance, density = config.pictures.guidance, config.render.states.density
        mixture = make_mixture(
            config.run, classes, ledger, teacher, split, guidance, density, config.train.seed, runtime
        )
        last_sample = mixture.schedule.boundary(config.train.max_samples)
        student = fit(
            student,
            objective,
            mixture.batches,
            teacher.uncond,
            config.train,
            folder,
            runtime=runtime,
            identity=classes_run_identity(config, mixture.classes.manifest.recipe, saved.weights, ledger),
            last_sample=last_sample,
            groups=mixture.group_names,
            sizes=mixture.sizes,
            resume=config.resume,
            hooks=replace(with_upload_hooks(monitor.hooks(), uploader), on_start=save_run_files),
        )
        student = merge_adapters(student)
        runtime.on_main(export_student, config, origin, teacher, classes, monitor, student, last_sample)
        uploader.send_export(folder / "export")
        runtime.close()


def with_cache_sizes(config: Config) -> Config:
    """The settings with the sizes that RUN/cache trains on and their shares where they list none."""
    if config.render.sizes:
        return config
    sizes = training_shares(Manifest.open(config.run / "cache"))
    return config.model_copy(update={"render": config.render.model_copy(update={"sizes": sizes})})


def plan_class_pictures(config: Config, teacher: Teacher, classes: ClassFile) -> PicturePlan:
    """The pictures of the classes; prints them, raises `Refused` where there cannot be any, and writes nothing."""
    distilled, cache = config.run / "cache", config.run / "classes" / "cache"
    prior_sampling_weights(classes, Reader(distilled, "train").class_names)
    source = prompts_identity(config.prompts, config.seed, classes, config.count)
    recipe = recipe_of(teacher, config.render, source, existing=recipe_in(cache))
    plan = plan_pictures(classes, config.prompts, config.seed, config.count, config.pictures, distilled, recipe)
    sizes = RenderSizes.checked(config.render.sizes, teacher.components.latents).listed
    for line in [*plan.crop_lines(sizes), *plan.truncation_lines(teacher.components.tokenizer)]:
        print(line)
    print("\n".join(plan.class_lines(classes)))
    open_class_cache(config.run, config.render, teacher, plan)
    return plan


def refuse_sizes(config: Config, runtime: Runtime, teacher: Teacher, plan: PicturePlan) -> None:
    """Raise `Refused` for a size of the pictures that the prior has not, or whose batches cannot be split."""
    sizes = sorted({task.size for task in class_tasks(config.render, teacher, plan)})
    refuse_uneven_batches(config.train, runtime, sizes)
    for size in sizes:
        split_batch_size(config.train.rows_of(size), config.prior_share, size)
    native = teacher.components.native_size
    refuse_missing_sizes(sizes, Reader(config.run / "cache", "train", unstated_size=native))


def refill_class_cache(config: Config, origin: Origin) -> None:
    """Make the missing records of an existing cache of the classes, with the teacher of `origin`."""
    teacher = Teacher(load_run_teacher(origin, device_of(config.device), torch.float32), origin.tail)
    plan = plan_class_pictures(config, teacher, load_classes(config.classes))
    fill_class_cache(config.run, config.render, teacher, plan, config.pictures.fit_steps)


def save_settings(config: Config, origin: Origin, class_file: bytes | None = None) -> None:
    """Save in RUN/classes all settings from which it can be made again; the class file with these bytes, if given."""
    folder = config.run / "classes"
    atomic_write(folder / "config.yaml", resolved_yaml(config, "finetune_classes"))
    atomic_write(folder / "classes.yaml", config.classes.read_bytes() if class_file is None else class_file)
    origin.save(folder)


def classes_run_identity(
    config: Config, recipe: Recipe, start_weights: Path, ledger: Ledger | None
) -> dict[str, JsonValue]:
    """All that decides the weights beyond the training's own settings; without a ledger, as far as it is known."""
    return {
        "recipe": recipe.fingerprint(),
        "pictures": ledger.sha256() if ledger else "",
        "prior": Manifest.open(config.run / "cache").recipe.fingerprint(),
        "prior_share": config.prior_share,
        "start": file_sha256(start_weights),
        **({"exam": config.exam.model_dump(mode="json", exclude={"pictures"})} if config.stop else {}),
        **({"guidance": config.pictures.guidance} if ledger and ledger.usable_keys("data", "photograph") else {}),
        **({"lora": config.lora.model_dump(mode="json")} if config.lora else {}),
    }


def export_student(
    config: Config,
    origin: Origin,
    teacher: Teacher,
    classes: ClassFile,
    monitor: ClassMonitor,
    student: Student,
    last_sample: int,
) -> None:
    """Measure each class before and after, and export the student, verified."""
    folder = config.run / "classes"
    samples = monitor.best_checkpoint(last_sample)
    if config.stop is not None:
        print(f"{folder}: its best checkpoint is that after {samples} samples")
        student = load_student(open_run(folder, samples), teacher.components)
    results = monitor.compare_models(student)
    save_table(classes, results, folder / "per_class.csv")
    show_table(classes, results)

    facts = origin.export_facts(teacher.components, samples)
    exported = export_all(student, teacher.components.present_folder(), folder / "export", facts)
    exported += export_lora(open_run(folder, samples), folder / "export")
    atomic_write(folder / "COMPLETE", f"{samples}\n")
    print(f"{', '.join(map(str, exported))}: written and verified; table in {folder / 'per_class.csv'}")
