"""A conversion before its first step: base, fine-tune, cache and run folder, opened or refused as they do not fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from configs.values import PictureSize
from shards.manifest import MANIFEST_FILE
from stages import doctor
from stages.cache_teacher import CacheJob, open_job, refuse_too_small_machine
from stages.convert.base import MOVE_OPTION, base_sizes, fine_tune_source, open_base
from stages.convert.config import Config
from stages.convert.delta import refuse_other_anatomy, relative_distance
from stages.convert.results import START_FILE, VERDICT_FILE, ResultFile, refuse_foreign_run
from stages.convert.starts import Models, Probe, usable_starts
from stages.convert.verdict import Verdict
from stages.evaluate.recorded_prompts import distinct_texts, recorded_prompts
from stages.export import export_paths
from stages.export.existing import refuse_occupied
from stages.nets.measured_teacher import load_measured_teacher
from stages.nets.run_folder import BASE_PLACE, ORIGIN_FILE, Origin, SavedRun, cache_folder, load_run_teacher
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import PromptSource, derived_seed
from stages.system.disk import file_sha256, refuse_unwritable
from stages.system.ownership import refuse_claimed
from stages.system.refusal import Refused
from stages.teacher_files.source import TeacherSource
from stages.train.objective import Objective
from stages.train.runtime import Runtime
from stages.train.setup import CLAIM_PURPOSE, refuse_start, refuse_uneven_batches


@dataclass(frozen=True)
class Conversion:
    """All that the parts of a conversion need; nothing of it is written yet."""

    config: Config
    runtime: Runtime
    base: SavedRun
    prompts: PromptSource
    job: CacheJob
    teacher: Teacher
    """The fine-tune, in full precision."""

    @property
    def folder(self) -> Path:
        """The run folder of the training."""
        return self.config.out / "distill"

    @property
    def native(self) -> PictureSize:
        """The size of the pictures that the fine-tune was made for."""
        return self.teacher.components.native_size

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """The picture sizes that the polish learns, the most frequent first."""
        drawn = {task.size for task in self.job.all_tasks if task.split == "train"}
        shares = sorted(self.job.config.render.sizes, key=lambda one: -one.share)
        return tuple(one.size for one in shares if one.size in drawn) or (self.native,)

    @property
    def main_size(self) -> PictureSize:
        """The size at which students are measured, as `Models.size`."""
        return self.native if self.native in self.sizes else self.sizes[0]

    @property
    def probe_seed(self) -> int:
        """The seed of the probe's prompts and noises, which are not the verdict's."""
        return derived_seed("probe", self.config.seed)

    @cached_property
    def probe_texts(self) -> list[str]:
        """The prompts by which starts and checkpoints are measured."""
        return distinct_texts(self.prompts, self.probe_seed, self.config.probe.prompts)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """All that the start depends on, as JSON values."""
        config, origin = self.config, self.base.origin
        return {
            "base": {
                "weights": file_sha256(self.base.weights),
                "samples": self.base.samples,
                "teacher": dict(origin.teacher_sha256),
                "recipe": origin.recipe_sha256,
            },
            "recipe": self.job.writer.manifest.recipe.fingerprint(),
            "count": config.count,
            "validation_count": config.validation_count,
            "start": config.start,
            "seed": config.seed,
            "probe": config.probe.model_dump(mode="json"),
        }

    @property
    def start_file(self) -> ResultFile[Probe]:
        """The probe's table and the chosen start."""
        return ResultFile(Probe, self.folder / START_FILE, self.made_from)

    @property
    def verdict_file(self) -> ResultFile[Verdict]:
        """The measurement of the polished student."""
        made_from = {**self.made_from, "verdict": self.config.verdict.model_dump(mode="json")}
        return ResultFile(Verdict, self.folder / VERDICT_FILE, made_from)

    def identity(self, start: str) -> dict[str, Any]:
        """What the polished weights depend on beyond the training's own settings."""
        config = self.config
        gate = {"gate": [config.gate, config.train.checkpoint_every_samples]} if config.gate is not None else {}
        return {"conversion": {**self.made_from, "start": start}, "david": config.david.model_dump(mode="json"), **gate}

    def origin(self, probe: Probe | None = None) -> Origin:
        """Where the converted student comes from; the start as far as it is known."""
        recipe, manifest = self.job.writer.manifest.recipe, self.job.writer.manifest
        base = {
            BASE_PLACE: str(self.base.folder.absolute()),
            "run": self.base.folder.absolute().parent.name,
            "weights_sha256": self.made_from["base"]["weights"],
            "samples": self.base.samples,
            "recipe_sha256": self.base.origin.recipe_sha256,
            "teacher_sha256": dict(self.base.origin.teacher_sha256),
            **({"start": probe.best, "distance": probe.distance} if probe else {}),
        }
        return replace(Origin.from_recipe(recipe, {str(size) for size in manifest.sizes_of("train")}), base=base)

    def load_models(self) -> Models:
        """The base, its teacher on the CPU, and the fine-tune; raises `Refused` where the base's teacher is gone."""
        parts = load_run_teacher(self.base.origin, torch.device("cpu"), torch.float32, MOVE_OPTION)
        return Models(self.base, parts, self.teacher, self.sizes)


def open_conversion(config: Config, runtime: Runtime) -> Conversion:
    """Open everything that a conversion needs; raises `Refused` for all that would fail later. Nothing is written."""
    base, folder = open_base(config.base, config.base_teacher), config.out / "distill"
    refuse_same_folder(config, base)
    refuse_unwritable(folder / START_FILE)
    refuse_claimed(folder, CLAIM_PURPOSE)
    refuse_foreign_run(folder)
    refuse_uneven_batches(config.train, runtime)
    prompts, source = config.prompts or recorded_prompts(base), fine_tune_source(config, base)
    base_parts = load_run_teacher(base.origin, torch.device("cpu"), torch.float32, MOVE_OPTION)
    learnt = base.origin.learnt_sizes(base_parts.native_size)

    opened = load_measured_teacher(source, runtime.device)
    parts, tail = opened.components, base.origin.tail
    refuse_other_anatomy(base_parts.unet, parts.unet, "the fine-tune")
    if config.start == "delta":
        models = Models(base, base_parts, Teacher(parts, tail))
        usable_starts(models, config.start_names, relative_distance(base_parts.unet, parts.unet))
        del models
    del base_parts  # it is loaded again where it is needed
    sizes = base_sizes(base, learnt, parts.native_size, config.render.sizes)
    refuse_uneven_batches(config.train, runtime, [one.size for one in sizes])
    job = open_job(config.cache_config(opened.source, prompts, tail, sizes), opened)
    conversion = Conversion(config, runtime, base, prompts, job, Teacher(parts, tail))
    if not conversion.start_file.path.exists():
        listed = [one.size for one in job.config.render.sizes] or [parts.native_size]
        refuse_unusable(conversion.teacher, listed)
    refuse_other_settings(conversion)
    if not config.plan:
        refuse_too_small_machine(job)
    return conversion


def refuse_unusable(teacher: Teacher, sizes: Sequence[PictureSize]) -> None:
    """Raise `Refused` with a line for each problem that `doctor` sees in a loaded fine-tune: pictures, memory."""
    page, parts = doctor.Page(), teacher.components
    settings = doctor.Config(teacher=TeacherSource(location=parts.location))
    doctor.make_pictures(page, settings, teacher, sizes)
    doctor.describe_training(page, parts, parts.unet.device)
    if page.problems:
        raise Refused("\n".join(page.problems))


def refuse_same_folder(config: Config, base: SavedRun) -> None:
    """Raise `Refused` where the conversion would be written into its base, or into a folder that is no run's root."""
    out, own = config.out.resolve(), base.folder.resolve()
    if own in (out, out / "distill") or config.base.resolve() == out:
        raise Refused(f"--out {config.out}: is the base run, which stays as it is - name another folder")
    if inside := [one for one in (own, cache_folder(own)) if one == out or one in out.parents]:
        raise Refused(
            f"--out {config.out}: lies in the base run's {inside[0]}, which stays as it is - name another folder"
        )
    for file, kind in ((ORIGIN_FILE, "run"), (MANIFEST_FILE, "cache"), ("model_index.json", "model")):
        if (config.out / file).is_file():
            raise Refused(
                f"--out {config.out}: is itself a {kind} ({file}), and not the folder that holds cache and run - name "
                "another folder"
            )


def refuse_other_settings(conversion: Conversion) -> None:
    """Raise `Refused` where the folder holds another conversion, or files that an export would overwrite."""
    config, folder, parts = conversion.config, conversion.folder, conversion.teacher.components
    probe = conversion.start_file.read()
    conversion.verdict_file.read()
    origin = conversion.origin(probe)
    refuse_occupied(folder / "export", export_paths(origin, origin.export_facts(parts, 0)))
    refuse_start(
        Student.from_teacher(parts.unet),
        Objective(config.objective, ()),
        config.train,
        folder,
        conversion.runtime,
        conversion.identity(probe.best if probe else ""),
        config.resume,
    )
