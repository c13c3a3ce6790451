"""`sollune classes show FILE`: pictures, samples and epochs of each class of a class file, and its cost."""

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.values import Strict
from shards.manifest import Manifest
from stages.cache.sizes import RenderSizes
from stages.cache.targets import RenderConfig, refuse_windows, training_shares
from stages.classes.cached import records_by_class
from stages.classes.mixture import DEFAULT_PRIOR_SHARE, split_batch_size
from stages.classes.photographs import crop_lines, hidden_file_lines, list_photographs
from stages.classes.pictures import PicturesConfig, find_reusable, recipe_differences
from stages.classes.selection import (
    DEFAULT_PICTURES,
    PromptSearch,
    expected_samples,
    picture_quotas,
    prior_sampling_weights,
    prompts_identity,
    search_prompts,
)
from stages.classes.specification import ClassFile, load_classes
from stages.nets.latents import LatentGeometry
from stages.prompts import PromptSource, omission_lines
from stages.system.refusal import Refused
from stages.system.terminal import console
from stages.train.journal import JOURNAL_FILE, read_step_lines
from stages.train.setup import TrainConfig

PIPE_WIDTH = 132
PIXELS_PER_LATENT = 8
"""Of a side, in every SD-1.x model."""


class Config(Strict):
    """Print quotas, samples, epochs and cost of a class file; --config takes its finetune_classes section."""

    model_config = ConfigDict(extra="ignore")  # the section has more keys than this command needs

    classes: Path = Field(description="YAML file of the classes")
    run: Path | None = Field(None, description="run folder, to look into RUN/cache and RUN/classes; none looks nowhere")
    prompts: PromptSource | None = Field(None, description="where the sentences come from; none looks for no prompt")
    seed: int = Field(1, description="seed of the prompts")
    count: int = Field(DEFAULT_PICTURES, ge=1, description="pictures in all")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    pictures: PicturesConfig = Field(PicturesConfig(), description="where the pictures come from")
    prior_share: float = Field(DEFAULT_PRIOR_SHARE, gt=0, lt=1, description="share of RUN/cache in each batch")
    train: TrainConfig = Field(TrainConfig(), description="how long the training is")

    @model_validator(mode="after")
    def _check_windows(self) -> "Config":
        refuse_windows(self.render.states)
        return self

    def folder(self, part: str) -> Path | None:
        """A cache of the run, if there is one."""
        return self.run / part if self.run and (self.run / part / "manifest.json").is_file() else None


@dataclass(frozen=True)
class ClassPlan:
    """The numbers of a class file; all but the last by class name."""

    pictures: dict[str, int]
    """from prompts: generated, or from the cache"""
    photographs: dict[str, int]
    expected_samples: dict[str, float]
    """mean rows of the training"""
    epochs: dict[str, float]
    """mean rows over the states of the class's pictures"""
    total_samples: int
    """rows of the whole training, those of the prior too"""


def print_plan(config: Config) -> None:
    """Print the table and the cost; raises `Refused` for overlaps, empty classes and impossible quotas."""
    classes = load_classes(config.classes)
    plan = plan_classes(classes, config)
    search = search_prompts(config.prompts, config.seed, "train", classes, plan.pictures) if config.prompts else None
    cached = cached_record_counts(classes, config)
    lines = cost_lines(classes, config, plan)
    if cached is not None:
        lines += [
            f"new       class {spec.name!r}: none of the records that the student learnt from is of it"
            for spec in classes.classes
            if not (spec.tags or cached[spec.name])
        ]
    lines += [line for spec in classes.classes for line in hidden_file_lines(spec)]
    lines += photograph_lines(classes, config)
    if search and config.prompts:
        lines += omission_lines(config.prompts.unusable_rows(search.prompts_read))
        lines += [f"prompts   the first {search.prompts_read:,} of the source hold them all"]
    wide = wide_console()
    wide.print(plan_table(classes, plan, search, cached))
    wide.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def plan_classes(classes: ClassFile, config: Config) -> ClassPlan:
    """The numbers; raises `Refused` for quotas that cannot be met and photographs that cannot be used."""
    pictures = picture_quotas(classes, config.count)
    batch_size = config.train.batch_size
    if config.train.batch_pixels is None:
        rows, _ = split_batch_size(batch_size, config.prior_share)
        total = -(-config.train.max_samples // batch_size) * batch_size
        in_classes = total // batch_size * rows
    else:  # the rows of a batch follow from its size
        total = config.train.max_samples
        in_classes = round(total * (1 - config.prior_share))
    samples = {name: float(mean) for name, mean in expected_samples(classes, in_classes).items()}
    states = config.render.states.states_per_prompt
    own = {spec.name: len(list_photographs(spec)) for spec in classes.classes}
    epochs = {name: samples[name] / ((pictures[name] + own[name]) * states) for name in samples}
    return ClassPlan(pictures, own, samples, epochs, total)


def cached_record_counts(classes: ClassFile, config: Config) -> Counter[str] | None:
    """The train records of each class in RUN/cache, from its table, which stores no tags; None where there is no cache.

    Raises `Refused` naming a class whose prior matches no record.
    """
    cache = config.folder("cache")
    if cache is None:
        return None
    names = Counter({name: len(records) for name, records in records_by_class(cache).items()})
    counts = Counter[str]()
    for name, records in names.items():
        owner = classes.owner(name)
        counts[owner.name if owner else ""] += records
    prior_sampling_weights(classes, lambda: list(names.elements()))
    return counts


def cost_lines(classes: ClassFile, config: Config, plan: ClassPlan) -> list[str]:
    """Pictures to generate, samples to train, and the time if an earlier run measured its speed."""
    total, states = sum(plan.pictures.values()) - _count_reused(classes, config, plan), config.render.states
    missing = max(0, total - _count_existing(classes, config))  # generated pictures are the first in the cache
    calls = 2 * (states.steps + states.renoised_states)
    in_classes = round(sum(plan.expected_samples.values()))
    return [
        f"generate  {missing:,} of {total:,} pictures ({missing * states.states_per_prompt:,} states, "
        f"{missing * calls:,} predictions of the teacher)",
        f"train     {plan.total_samples:,} samples, {in_classes:,} of them of the classes",
        f"time      {training_time_text(config.run, plan.total_samples)}",
    ]


def training_time_text(run: Path | None, samples: int) -> str:
    """The training time at the speed of the run's newest journal."""
    for folder in (run / "classes", run / "distill") if run else ():
        journal = folder / JOURNAL_FILE
        if journal.is_file():
            rate = _median_samples_per_second(folder)
            return f"{samples / rate / 60:.1f} minutes to train at the {rate:.0f} samples/s of {journal}"
    return "unknown: no journal of an earlier run"


def _median_samples_per_second(folder: Path) -> float:
    try:
        return statistics.median(float(line["samples_per_second"]) for line in read_step_lines(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{folder / JOURNAL_FILE}: has no speed ({error}) - remove it, or leave --run out") from error


def _count_reused(classes: ClassFile, config: Config, plan: ClassPlan) -> int:
    """Pictures that RUN/cache gives, if it was rendered in the same way."""
    cache = config.folder("cache")
    if cache is None:
        return 0
    manifest = Manifest.open(cache)
    recipe = manifest.recipe
    identity = {**recipe.identity, "render": config.render.identity(render_sizes(config, manifest))}
    if recipe_differences(cache, recipe.model_copy(update={"identity": identity})):
        return 0
    return sum(map(len, find_reusable(cache, classes, config.pictures.max_reused(plan.pictures)).values()))


def render_sizes(config: Config, manifest: Manifest) -> RenderSizes:
    """The sizes of the pictures: as configured, or else those of the training split of this cache."""
    latents: Any = manifest.recipe.identity.get("latent_shape")
    geometry = LatentGeometry(latents[0], latents[1], PIXELS_PER_LATENT)
    return RenderSizes.checked(config.render.sizes or training_shares(manifest), geometry)


def photograph_lines(classes: ClassFile, config: Config) -> list[str]:
    """Lines on the photographs that will be cropped, where RUN/cache tells the sizes."""
    cache = config.folder("cache")
    if cache is None:
        return []
    sizes = render_sizes(config, Manifest.open(cache)).listed
    return [line for spec in classes.classes for line in crop_lines(spec.name, list_photographs(spec), sizes)]


def _count_existing(classes: ClassFile, config: Config) -> int:
    """Records in RUN/classes/cache, if they are of this class file."""
    cache = config.folder("classes/cache")
    if cache is None or config.prompts is None:
        return 0
    manifest = Manifest.open(cache)
    if manifest.recipe.identity["prompts"] != prompts_identity(config.prompts, config.seed, classes, config.count):
        return 0
    return sum(shard.records for shard in manifest.shards_of("train"))


def plan_table(
    classes: ClassFile, plan: ClassPlan, search: PromptSearch | None, cached_counts: Counter[str] | None
) -> Table:
    """A row for each class."""
    names, specs = [spec.name for spec in classes.classes], classes.classes
    photographs = [str(plan.photographs[name]) for name in names] if any(plan.photographs.values()) else None
    distinct = [str(len({prompt.text for prompt in search.prompts[name]})) for name in names] if search else None
    cached = None if cached_counts is None else ["?" if spec.tags else str(cached_counts[spec.name]) for spec in specs]
    return column_table(
        {"class": [escape(name) for name in names], "prompts": [escape(spec.rule) for spec in specs]},
        {
            "weight": [f"{spec.priority} {classes.relative_weight(spec):g}" for spec in specs],
            "share %": [f"{100 * classes.sampling_share(spec):.1f}" for spec in specs],
            "pictures": [str(plan.pictures[name]) for name in names],
            "samples": [f"{plan.expected_samples[name]:.1f}" for name in names],
            "epochs": [f"{plan.epochs[name]:.2f}" for name in names],
            "photographs": photographs,
            "distinct": distinct,
            "in cache": cached,
        },
    )


def column_table(left: Mapping[str, Sequence[str]], right: Mapping[str, Sequence[str] | None]) -> Table:
    """A table of left- and right-aligned columns by title; columns that are None are left out."""
    table = Table(box=SIMPLE, pad_edge=False, caption_justify="left")
    columns = {**left, **{title: cells for title, cells in right.items() if cells is not None}}
    for title in columns:
        table.add_column(title, justify="left" if title in left else "right", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def wide_console() -> Console:
    """A console as wide as the terminal; 132 columns for a file or a pipe."""
    return console(None if sys.stdout.isatty() else PIPE_WIDTH)
