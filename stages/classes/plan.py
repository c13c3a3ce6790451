"""What a class file will mean: pictures, draws and epochs of each class, and what the run's cache holds of it.

What is left to do for a class file: pictures to paint, samples to train, and the time where it was once measured.

`sollune classes show FILE`: a class file as a table, with what it will cost.
"""

import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, Field
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.values import Strict
from shards.manifest import Manifest
from stages.cache.targets import RenderConfig
from stages.classes import (
    DEFAULT_PICTURES,
    ClassFile,
    PromptSearch,
    expected_samples,
    load_classes,
    picture_quotas,
    prior_sampling_weights,
    prompts_identity,
    search_prompts,
)
from stages.classes.cached import records_by_class
from stages.classes.mixture import DEFAULT_PRIOR_SHARE, split_batch_size
from stages.classes.photographs import hidden_file_lines, list_photographs
from stages.classes.pictures import PicturesConfig, find_reusable, recipe_differences
from stages.prompts import PromptSource, omission_lines
from stages.system.refusal import Refused
from stages.system.terminal import console
from stages.train.journal import JOURNAL_FILE, read_step_lines
from stages.train.setup import TrainConfig


class Config(Strict):
    """Print quotas, draws, epochs and cost of a class file; --config takes its finetune_classes section."""

    model_config = ConfigDict(extra="ignore")  # the section says much more than this command asks

    classes: Path = Field(description="YAML file of the classes")
    run: Path | None = Field(None, description="run folder, to look into RUN/cache and RUN/classes; none looks nowhere")
    prompts: PromptSource | None = Field(None, description="where the sentences come from; none looks for no prompt")
    seed: int = Field(1, description="seed of the prompts")
    count: int = Field(DEFAULT_PICTURES, ge=1, description="pictures in all")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    pictures: PicturesConfig = Field(PicturesConfig(), description="where the pictures come from")
    prior_share: float = Field(
        DEFAULT_PRIOR_SHARE, gt=0, lt=1, description="share of each batch from the distillation cache"
    )
    train: TrainConfig = Field(TrainConfig(), description="how long the training is")


@dataclass(frozen=True)
class ClassPlan:
    """The numbers of a class file; everything by class name but the last."""

    pictures: dict[str, int]
    """Had of prompts: painted, or taken from the cache."""
    photographs: dict[str, int]
    expected_samples: dict[str, float]
    """Expected rows of the training; exact, before they are rounded to a float."""
    epochs: dict[str, float]
    """Expected draws over the states that the class's pictures hold."""
    total_samples: int
    """Rows of the whole training, those of the prior too."""


def plan_classes(classes: ClassFile, config: Config) -> ClassPlan:
    """The numbers; raises `Refused` for quotas that cannot be met and photographs that cannot be used."""
    pictures = picture_quotas(classes, config.count)
    rows, _ = split_batch_size(config.train.batch_size, config.prior_share)
    draws = {name: float(share) for name, share in expected_samples(classes, config.train.steps * rows).items()}
    states = config.render.states.states_per_prompt
    own = {spec.name: len(list_photographs(spec)) for spec in classes.classes}
    epochs = {name: draws[name] / ((pictures[name] + own[name]) * states) for name in draws}
    return ClassPlan(pictures, own, draws, epochs, config.train.samples)


def cached_record_counts(classes: ClassFile, cache: Path) -> Counter[str] | None:
    """The train records of each class in the distillation cache, by its table; tags are not told there.

    None where there is no cache. Raises `Refused` naming a class whose prior fits none of its records.
    """
    if not (cache / "manifest.json").is_file():
        return None
    names = Counter({name: len(records) for name, records in records_by_class(cache).items()})
    found = Counter[str]()
    for name, records in names.items():
        owner = classes.owner(name)
        found[owner.name if owner else ""] += records
    prior_sampling_weights(classes, lambda: list(names.elements()))
    return found


def cost_lines(classes: ClassFile, config: Config, plan: ClassPlan) -> list[str]:
    """What there is to do, in pictures, samples and, where an earlier run measured its speed, time."""
    whole, states = sum(plan.pictures.values()) - count_reused(classes, config, plan), config.render.states
    missing = max(0, whole - count_generated(classes, config))  # those to be painted are the first in the cache
    calls = 2 * (states.steps + states.renoised_states)
    return [
        f"to paint  {missing:,} of {whole:,} pictures ({missing * states.states_per_prompt:,} states, "
        f"{missing * calls:,} answers of the teacher)",
        f"to train  {plan.total_samples:,} samples, {round(sum(plan.expected_samples.values())):,} of them of the "
        "classes",
        f"time      {training_time_text(config.run, plan.total_samples)}",
    ]


def training_time_text(run: Path | None, samples: int) -> str:
    """Told by the newest story of the run that measured its speed."""
    for story in (run / "classes", run / "distill") if run else ():
        if (story / JOURNAL_FILE).is_file():
            rate = median_samples_per_second(story)
            return f"{samples / rate / 60:.1f} minutes to train at the {rate:.0f} samples/s of {story / JOURNAL_FILE}"
    return "not told: no journal of an earlier run"


def median_samples_per_second(folder: Path) -> float:
    """Samples per second: the median of the lines about training in a story's journal."""
    try:
        return statistics.median(float(line["samples_per_second"]) for line in read_step_lines(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{folder / JOURNAL_FILE}: tells no speed ({error}) - remove it, or leave --run out") from error


def count_reused(classes: ClassFile, config: Config, plan: ClassPlan) -> int:
    """Pictures that RUN/cache gives, if it was rendered in the same way."""
    cache = config.run / "cache" if config.run else None
    if cache is None or not (cache / "manifest.json").is_file():
        return 0
    recipe = Manifest.open(cache).recipe
    asked = {**recipe.identity, "render": config.render.model_dump(mode="json")}
    if recipe_differences(cache, recipe.model_copy(update={"identity": asked})):
        return 0
    return sum(map(len, find_reusable(cache, classes, config.pictures.max_reused(plan.pictures)).values()))


def count_generated(classes: ClassFile, config: Config) -> int:
    """Records of this very class file that lie in RUN/classes/cache; those of another are not counted."""
    cache = config.run / "classes" / "cache" if config.run else None
    if cache is None or config.prompts is None or not (cache / "manifest.json").is_file():
        return 0
    manifest = Manifest.open(cache)
    if manifest.recipe.identity["prompts"] != prompts_identity(config.prompts, config.seed, classes, config.count):
        return 0
    return sum(shard.records for shard in manifest.shards_of("train"))


PIPE_WIDTH = 132


def print_plan(config: Config) -> None:
    """Print the table and the cost; raises `Refused` for overlaps, empty classes and impossible quotas."""
    classes = load_classes(config.classes)
    found = plan_classes(classes, config)
    prompts = search_prompts(config.prompts, config.seed, "train", classes, found.pictures) if config.prompts else None
    cached = cached_record_counts(classes, config.run / "cache") if config.run else None
    wide = wide_console()
    wide.print(plan_table(classes, found, prompts, cached))
    wide.print("\n".join(cost_lines(classes, config, found)), soft_wrap=True, highlight=False, markup=False)
    for name in [spec.name for spec in classes.classes if cached is not None and not (spec.tags or cached[spec.name])]:
        wide.print(f"new       class {name!r}: none of the records that the student learnt from is of it", markup=False)
    for spec in classes.classes:
        for line in hidden_file_lines(spec):
            wide.print(line, soft_wrap=True, highlight=False, markup=False)
    if prompts and config.prompts:
        for line in omission_lines(config.prompts.unusable_rows(prompts.prompts_read)):
            wide.print(line, soft_wrap=True, highlight=False, markup=False)
        wide.print(f"prompts   the first {prompts.prompts_read:,} of the source hold them all", highlight=False)


def wide_console() -> Console:
    """A console as wide as the terminal; what goes into a file or a pipe is not squeezed into 80."""
    return console(None if sys.stdout.isatty() else PIPE_WIDTH)


def plan_table(
    classes: ClassFile, plan: ClassPlan, prompts: PromptSearch | None, cached_counts: Counter[str] | None
) -> Table:
    """A row for each class."""
    shown = Table(box=SIMPLE, pad_edge=False)
    for head in ("class", "prompts"):
        shown.add_column(head, overflow="fold")
    heads = ["weight", "share %", "pictures", "draws", "epochs"]
    heads += ["photographs"] if any(plan.photographs.values()) else []
    heads += ["distinct"] if prompts else []
    heads += ["in cache"] if cached_counts is not None else []
    for head in heads:
        shown.add_column(head, justify="right", overflow="fold")
    for spec in classes.classes:
        name = spec.name
        cells = [f"{spec.priority} {classes.relative_weight(spec):g}", f"{100 * classes.sampling_share(spec):.1f}"]
        cells += [str(plan.pictures[name]), f"{plan.expected_samples[name]:.1f}", f"{plan.epochs[name]:.2f}"]
        cells += [str(plan.photographs[name])] if any(plan.photographs.values()) else []
        cells += [str(len({prompt.text for prompt in prompts.prompts[name]}))] if prompts else []
        cells += ["?" if spec.tags else str(cached_counts[name])] if cached_counts is not None else []
        shown.add_row(escape(name), escape(spec.rule), *cells)
    return shown
