"""The runs of a study: one job for each regime, arm and seed, with all of its settings, checked before any begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from configs.load import load
from configs.schema import Layer
from configs.values import Strict
from stages import cache_teacher, distill, finetune_classes
from stages.ablation.jobs import ClassesJob, DistillJob, Job
from stages.ablation.metrics import measurable
from stages.ablation.study import Settings, Study
from stages.classes.specification import load_classes
from stages.david.fusion import PLACEBOS
from stages.evaluate.settings import Config as EvaluateConfig
from stages.system.refusal import Refused, did_you_mean
from stages.train.validation import VALIDATION_BINS

C = TypeVar("C", bound=Strict)


@dataclass(frozen=True)
class Plan:
    """The runs of a study, and the settings of what they share."""

    study: Study
    jobs: Sequence[Job]
    cache: cache_teacher.Config
    base: distill.Config | None = None
    """the student from which all runs start, where they start from one"""
    evaluate: EvaluateConfig | None = None
    """how students are measured, where that is not by their exam"""


@dataclass(frozen=True)
class _Places:
    file: Path
    """the study's, for messages"""
    run: Path
    """holds the cache, and the distilled student where runs start from it"""
    out: Path
    device: str


def make_plan(study: Study, file: Path, run: Path, out: Path, device: str) -> Plan:
    """All jobs, seed by seed, so that early results are of all arms; raises `Refused` for settings that are wrong.

    `file` is the study's, for messages; RUN/cache is the cache, the runs lie in `out`.
    """
    places = _Places(file, run, out, device)
    words = ["--run", str(run), "--device", device]
    cache = load(cache_teacher.Config, "cache_teacher", study.files, words)
    if study.command == "finetune_classes":
        return Plan(study, _classes_jobs(study, places), cache, load(distill.Config, "distill", study.files, words))
    overlay = [Layer(f"{file}: evaluate", study.evaluate)]
    evaluate = load(EvaluateConfig, "evaluate", study.files, words, overlays=overlay)
    evaluate = evaluate.model_copy(update={"prompts": evaluate.prompts or cache.prompts})
    refuse_unmeasured(study, file, evaluate)
    jobs = _distill_jobs(study, places, evaluate)
    refuse_unreached(study, file, jobs)
    return Plan(study, jobs, cache, evaluate=evaluate)


def refuse_unmeasured(study: Study, file: Path, evaluate: EvaluateConfig) -> None:
    """Raise `Refused` where a verdict is wanted on a figure that these settings do not measure."""
    bins = VALIDATION_BINS if evaluate.velocity_states else 0
    known = measurable(evaluate.paired.steps, guidance_of(study, evaluate), evaluate.scorer is not None, bins)
    for name in (*study.metrics, *(name for one in study.comparisons for name in one.metrics)):
        if name not in known:
            raise Refused(
                f"{file}: metrics: {name}: is not measured with these settings: {did_you_mean(name, sorted(known))} - "
                "name one of those, or change evaluate.paired.steps, guidance, evaluate.scorer or velocity_states"
            )


def refuse_unreached(study: Study, file: Path, jobs: Sequence[DistillJob]) -> None:
    """Raise `Refused` where a verdict is wanted after a number of samples at which a run has no checkpoint."""
    for one in study.comparisons:
        for job in jobs:
            train = job.distill.train
            if one.samples is None or job.arm not in (*one.arms, *one.against) or not job.trains:
                continue
            step, every, last = train.batch_size, train.checkpoint_every_samples, train.max_samples
            # The first step at or after each multiple, and the last.
            at_or_before = one.samples // every * every
            reached = at_or_before > 0 and -(-at_or_before // step) * step == one.samples < last
            if not reached and one.samples != -(-last // step) * step:
                raise Refused(
                    f"{file}: comparisons: samples {one.samples}: {job.arm} has no checkpoint there - name a multiple "
                    f"of its train.checkpoint_every_samples ({every}), or {last}"
                )


def guidance_of(study: Study, evaluate: EvaluateConfig) -> tuple[float, ...]:
    """The guidance scales of the pictures."""
    return study.guidance or (evaluate.paired.sampler.guidance,)


def _distill_jobs(study: Study, places: _Places, evaluate: EvaluateConfig) -> list[DistillJob]:
    configs = _configs_of_arms(study, places, distill.Config)
    jobs = list[DistillJob]()
    for seed, regime, name in _runs(study):
        arm, config, home = study.arms[name], configs[regime, name], _home(study, places, regime, name, seed)
        config = with_seed(config, seed + arm.seed_offset)
        jobs.append(
            DistillJob(
                study=study.name,
                regime=regime,
                arm=name,
                seed=seed,
                home=home,
                distill=config.model_copy(update={"run": home}),
                evaluate=evaluate,
                guidance=guidance_of(study, evaluate),
                defects=arm.defects,
                model=arm.model,
                references=places.out / "references",
            )
        )
    return jobs


def with_seed(config: distill.Config, seed: int) -> distill.Config:
    """The settings with this seed: that of the order of the data, and of the permutations where David is a placebo."""
    train = config.train.model_copy(update={"seed": seed})
    if config.david.fusion.formula not in PLACEBOS:
        return config.model_copy(update={"train": train})
    fusion = config.david.fusion.model_copy(update={"placebo_seed": seed})
    return config.model_copy(update={"train": train, "david": config.david.model_copy(update={"fusion": fusion})})


def _classes_jobs(study: Study, places: _Places) -> list[Job]:
    configs = _configs_of_arms(study, places, finetune_classes.Config)
    class_files = {file: load_classes(file).sha256() for file in {config.classes for config in configs.values()}}
    jobs = list[Job]()
    for seed, regime, name in _runs(study):
        config, home = configs[regime, name], _home(study, places, regime, name, seed)
        own = {"seed": seed + study.arms[name].seed_offset}
        changes = {
            "run": home,
            "train": config.train.model_copy(update=own),
            "lora": config.lora and config.lora.model_copy(update=own),
        }
        jobs.append(
            ClassesJob(
                study=study.name,
                regime=regime,
                arm=name,
                seed=seed,
                home=home,
                finetune_classes=config.model_copy(update=changes),
                class_file=class_files[config.classes],
                references=places.out / "references",
            )
        )
    return jobs


def _runs(study: Study) -> list[tuple[int, str, str]]:
    """Seed, regime and arm of each run, in the order in which they are made."""
    return [
        (seed, regime, name)
        for seed in range(max(map(study.seeds_of, study.arms)))
        for regime in study.regimes
        for name in study.arms
        if regime in study.regimes_of(name) and seed < study.seeds_of(name)
    ]


def _home(study: Study, places: _Places, regime: str, name: str, seed: int) -> Path:
    return places.out / study.name / regime / name / f"seed{seed}"


def _configs_of_arms(study: Study, places: _Places, config_type: type[C]) -> dict[tuple[str, str], C]:
    """(regime, arm) -> its settings of the study's command; its run folder and seed are no one's yet."""
    return {
        (regime, name): _arm_config(study, places, regime, name, config_type)
        for regime in study.regimes
        for name in study.arms
        if regime in study.regimes_of(name)
    }


def _arm_config(study: Study, places: _Places, regime: str, name: str, config_type: type[C]) -> C:
    """The settings of an arm in a regime: files, then the study's options, the regime's, the arm's, then the budget."""
    arm, file = study.arms[name], places.file
    overlays = [
        Layer(f"{file}: options", underscored(study.options)),
        Layer(f"{file}: regimes.{regime}.options", underscored(study.regimes[regime].options)),
        Layer(f"{file}: arms.{name}.options", underscored(arm.options)),
    ]
    words = ["--run", study.name, "--device", places.device]
    if study.samples is not None:
        words += ["--train.max-samples", str(study.samples)]
    try:
        return load(config_type, study.command, [*study.files, *arm.files], words, overlays=overlays)
    except Refused as refusal:
        first, *_ = str(refusal).split("\n")
        where = "" if first.startswith(str(file)) else f"{file}: arm {name}, regime {regime}: "
        raise Refused(f"{where}{first}") from refusal


def underscored(options: Settings) -> dict[str, Any]:
    """The same with underscores for the dashes of options in its keys."""
    return {
        str(key).replace("-", "_"): underscored(value) if isinstance(value, dict) else value
        for key, value in options.items()
    }
