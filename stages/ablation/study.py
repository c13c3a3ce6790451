"""A study: arms of the same budget, which differ in settings of one command, in one or more regimes; read from YAML."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, ValidationError, model_validator

from configs.load import first_error
from configs.values import NonEmpty, Strict
from configs.yaml_text import read_yaml
from stages.ablation.metrics import CURVES, EXAMPLES, CommandName, is_metric
from stages.system.refusal import Refused, did_you_mean

Finding: TypeAlias = Literal["helps", "hurts", "no difference found"]
Outcome: TypeAlias = Finding | Literal["no verdict"]
DefectName: TypeAlias = Literal["noise_input", "default_schedule"]
"""Defects of the original experiment: `stages.ablation.defects` has what they do."""
ModelName: TypeAlias = Literal["student", "teacher", "teacher_as_student"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
OWN_KEYS = {
    "run": "--out says where runs lie",
    "train.seed": "seeds counts them, and seed_offset moves those of an arm",
    "train.max_samples": "samples is the budget of all arms",
    "windows": "a study compares distillations, not students of few steps",
    "fast": "a study compares distillations, not students of few steps",
    "hub": "publish a run afterwards",
    "resume": "runs go on by themselves",
    "processes": "each run has one process, --processes says how many run at once",
    "device": "give --device",
    "teacher": "give it to sollune cache-teacher",
}
"""Settings of `distill` that an arm cannot have, each with the way out."""
UNMEASURED_KEYS = (
    "run", "fidelity", "paired.controls", "paired.sizes", "features", "clip", "pictures", "coco", "lora",
    "lora_prompts", "gates", "device",
)  # fmt: skip
"""Settings of `evaluate` that change nothing of what a study measures."""
CLASSES_KEYS = {
    **{key: OWN_KEYS[key] for key in OWN_KEYS if key not in ("windows", "fast")},
    "lora.seed": OWN_KEYS["train.seed"],
    "stop": "runs of a study have the same budget",
}
"""The same of `finetune_classes`."""
MIN_SEEDS = 2


def check_name(name: str) -> str:
    """The name; raises `ValueError` for one that cannot be a folder's."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} should be up to 40 letters, digits, dashes and underscores, since it names a folder"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]
Settings: TypeAlias = dict[str, Any]
"""A nested mapping of settings, as a YAML file of `--config` has below its section."""


class Regime(Strict):
    """A condition under which all arms are compared."""

    title: NonEmpty = Field(description="in words, for tables")
    options: Settings = Field(default_factory=dict, description="settings of the command in this regime")


class Arm(Strict):
    """One variant of the training."""

    title: NonEmpty = Field(description="in words, for tables")
    files: tuple[Path, ...] = Field((), description="YAML files over those of the study")
    options: Settings = Field(default_factory=dict, description="settings of the command over those of the regime")
    defects: tuple[DefectName, ...] = Field((), description="defects of the original that no setting can have")
    regimes: tuple[str, ...] = Field((), description="the regimes in which it runs; none: all")
    seeds: int | None = Field(None, ge=MIN_SEEDS, description="number of seeds; none: that of the study")
    seed_offset: int = Field(
        0, ge=0, description="added to each seed: the same settings on another order of the data, as a control"
    )
    model: ModelName = Field(
        "student",
        description="teacher: nothing is trained, the teacher itself is sampled as a flow by the bridge; "
        "teacher_as_student: nothing either, its weights are sampled as if they were a student's",
    )

    @model_validator(mode="after")
    def _check_teacher(self) -> "Arm":
        if self.model != "student" and (self.files or self.options or self.defects):
            raise ValueError(f"model {self.model} trains nothing - leave files, options and defects out")
        return self


class Comparison(Strict):
    """Arms against controls."""

    arms: tuple[str, ...] = Field(min_length=1, description="the arms that are judged")
    against: tuple[str, ...] = Field(min_length=1, description="their controls, each against each")
    regimes: tuple[str, ...] = Field((), description="where; none: wherever both run")
    metrics: tuple[str, ...] = Field((), description="in which figures; none: those of the study")
    samples: int | None = Field(
        None, ge=1, description="after how many samples, by the curves of training; none: at the end"
    )
    expected: Finding | None = Field(
        None, description="what must come out if the design can be trusted; none: an open question"
    )


class Quick(Strict):
    """A small version of the study, for a first look."""

    seeds: int = Field(2, ge=MIN_SEEDS)
    samples: int = Field(ge=1, description="budget of each run")
    arms: tuple[str, ...] = Field(min_length=1)
    regimes: tuple[str, ...] = Field(min_length=1)
    options: Settings = Field(default_factory=dict, description="settings of the command for all runs")
    evaluate: Settings = Field(default_factory=dict, description="settings of evaluate for all runs")


class Study(Strict):
    """What is compared, under which conditions, with which budget, by which figures."""

    name: Name = Field(description="of its runs' folder, and in the table; by default the file's")
    title: NonEmpty = Field(description="the question, in words")
    command: CommandName = Field(
        "distill",
        description="what a run is: distill; or finetune_classes, from the distilled student beside the cache, "
        "measured by its exam",
    )
    files: tuple[Path, ...] = Field(min_length=1, description="YAML files, as for --config, that all runs share")
    options: Settings = Field(default_factory=dict, description="settings of the command for all runs")
    evaluate: Settings = Field(default_factory=dict, description="settings of evaluate for all runs")
    guidance: tuple[float, ...] = Field(
        (), description="guidance scales of the paired pictures, such as 1 (one branch) and 5; none: evaluate's"
    )
    samples: int | None = Field(
        None, ge=1, description="budget of each run, samples; none: what each arm's files say (not the same for all)"
    )
    seeds: int = Field(8, ge=MIN_SEEDS, description="seeds 0 to n - 1; runs of the same seed are compared")
    regimes: dict[Name, Regime] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1)
    metrics: tuple[str, ...] = Field(min_length=1, description="figures that verdicts are about, the main one first")
    comparisons: tuple[Comparison, ...] = ()
    quick: Quick | None = Field(None, description="what --quick runs")

    @model_validator(mode="after")
    def _check_names(self) -> "Study":
        for place, names, known in self._references():
            for name in names:
                if name not in known:
                    raise ValueError(f"{place}: {name}: {did_you_mean(name, list(known))} - name what is there")
        for number, one in enumerate(self.comparisons):
            of_curve = [name for name in one.metrics or self.metrics if name in CURVES]
            if one.samples is not None and not of_curve:
                raise ValueError(
                    f"comparisons.{number}: samples is for figures of the curves - name some of {', '.join(CURVES)}"
                )
        return self

    @model_validator(mode="after")
    def _check_comparisons(self) -> "Study":
        for number, one in enumerate(self.comparisons):
            for arm, control in ((arm, control) for arm in one.arms for control in one.against):
                common = {*self.regimes_of(arm)} & {*self.regimes_of(control)}
                if not common & {*(one.regimes or common)}:
                    where = f" in {', '.join(one.regimes)}" if one.regimes else ""
                    raise ValueError(
                        f"comparisons.{number}: {arm} and {control} never run together{where} - leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> "Study":
        for name in (*self.metrics, *(name for one in self.comparisons for name in one.metrics)):
            if not is_metric(name, self.command):
                raise ValueError(f"metrics: {name}: no figure that is measured - take {EXAMPLES[self.command]}")
        return self

    @model_validator(mode="after")
    def _check_command(self) -> "Study":
        if self.command == "distill":
            return self
        quick = self.quick.evaluate if self.quick else {}
        for place, value in {"evaluate": self.evaluate, "guidance": self.guidance, "quick.evaluate": quick}.items():
            if value:
                raise ValueError(f"{place}: runs of {self.command} are measured by their exam - set it under options")
        if wrong := [name for name, arm in self.arms.items() if arm.defects or arm.model != "student"]:
            raise ValueError(f"arms.{wrong[0]}: defects and model are of distill, not of {self.command} - leave them")
        return self

    @model_validator(mode="after")
    def _check_options(self) -> "Study":
        groups = {"options": self.options, **{f"arms.{name}.options": arm.options for name, arm in self.arms.items()}}
        groups |= {f"regimes.{name}.options": one.options for name, one in self.regimes.items()}
        groups |= {"quick.options": self.quick.options} if self.quick else {}
        for place, options in {
            "evaluate": self.evaluate,
            "quick.evaluate": self.quick.evaluate if self.quick else {},
        }.items():
            for key in flat_keys(options):
                if any(f"{key}.".startswith(f"{one}.") for one in UNMEASURED_KEYS):
                    raise ValueError(
                        f"{place}.{key}: changes nothing that a study measures - use it with sollune evaluate"
                    )
        own_keys = OWN_KEYS if self.command == "distill" else CLASSES_KEYS
        for place, options in groups.items():
            for key in flat_keys(options):
                for own, way_out in own_keys.items():
                    if f"{key}.".startswith(f"{own}.") and not (own == "train.max_samples" and self.samples is None):
                        raise ValueError(f"{place}.{key}: is not for a study - {way_out}")
        return self

    def _references(self) -> Iterable[tuple[str, Iterable[str], Iterable[str]]]:
        """Each place that names arms or regimes: where, what it names, and what there is."""
        for name, arm in self.arms.items():
            yield f"arms.{name}.regimes", arm.regimes, self.regimes
        for number, one in enumerate(self.comparisons):
            yield f"comparisons.{number}.arms", one.arms, self.arms
            yield f"comparisons.{number}.against", one.against, self.arms
            yield f"comparisons.{number}.regimes", one.regimes, self.regimes
        if self.quick:
            yield "quick.arms", self.quick.arms, self.arms
            yield "quick.regimes", self.quick.regimes, self.regimes

    def seeds_of(self, arm: str) -> int:
        """How many seeds an arm has."""
        return self.arms[arm].seeds or self.seeds

    def regimes_of(self, arm: str) -> tuple[str, ...]:
        """Where an arm runs."""
        return self.arms[arm].regimes or tuple(self.regimes)


def load_study(file: Path) -> Study:
    """The study of a YAML file; raises `Refused`, one line, for one that is broken."""
    content = read_yaml(file, str(file), "name a study such as configs/ablation/david.yaml")
    if not isinstance(content, dict):
        raise Refused(f"{file}: should be a mapping with title, files, arms and metrics - see configs/ablation")
    if "arms" not in content and set(content) & {"distill", "evaluate", "cache_teacher"}:
        raise Refused(f"{file}: holds settings for --config, not a study - name it under files, or in an arm's files")
    content = {"name": file.stem, "regimes": {"only": {"title": "as configured"}}, **content}
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        path, problem = first_error(error, Study, content)
        place = f"{file}: {'.'.join(map(str, path))}" if path else str(file)
        raise Refused(f"{place}: {problem}") from error


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Settings:
    """`upper` over `lower`, mapping by mapping."""
    both = {key: (lower[key], upper[key]) for key in lower.keys() & upper.keys()}
    inner = {k: merged(a, b) for k, (a, b) in both.items() if isinstance(a, Mapping) and isinstance(b, Mapping)}
    return {**lower, **upper, **inner}


def flat_keys(options: Mapping[str, Any], path: str = "") -> Iterable[str]:
    """The full keys of a nested mapping, joined by dots; dashes count as underscores."""
    for key, value in options.items():
        full = f"{path}.{key}".removeprefix(".").replace("-", "_")
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, full)
        else:
            yield full
