"""What a class file will mean: pictures, draws and epochs of each class, and what painting and training will cost."""

import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, Field
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.refusal import Refused
from configs.strict import Strict
from shards.manifest import Manifest
from shards.table import Table as Looked
from stages.classes import (
    PICTURES,
    ClassFile,
    Found,
    expected_draws,
    identity,
    load_classes,
    prior_weights,
    quotas,
    search,
)
from stages.prompts import PromptSource
from stages.targets import RenderConfig
from stages.train.config import TrainConfig
from stages.train.mixture import PRIOR_SHARE, rows_of


class Config(Strict):
    """Print quotas, draws, epochs and cost of a class file; --config takes its finetune_classes section."""

    model_config = ConfigDict(extra="ignore")  # the section says much more than this command asks

    classes: Path = Field(description="YAML file of the classes")
    run: Path | None = Field(None, description="run folder, to look into RUN/cache and RUN/classes; none looks nowhere")
    prompts: PromptSource | None = Field(None, description="where the sentences come from; none looks for no prompt")
    seed: int = Field(1, description="seed of the prompts")
    count: int = Field(PICTURES, ge=1, description="pictures in all")
    render: RenderConfig = Field(RenderConfig(), description="how prompts become records")
    prior_share: float = Field(PRIOR_SHARE, gt=0, lt=1, description="share of each batch from the distillation cache")
    train: TrainConfig = Field(TrainConfig(), description="how long the training is")


@dataclass(frozen=True)
class Outlook:
    """The numbers of a class file; everything by class name but the last."""

    pictures: dict[str, int]
    draws: dict[str, float]
    """Expected rows of the training; exact, before they are rounded to a float."""
    epochs: dict[str, float]
    """Expected draws over the states that the class's pictures hold."""
    samples: int
    """Rows of the whole training, those of the prior too."""


def outlook(classes: ClassFile, config: Config) -> Outlook:
    """The numbers; raises `Refused` for quotas that cannot be met."""
    pictures = quotas(classes, config.count)
    steps = -(-config.train.max_samples // config.train.batch_size)
    rows, _ = rows_of(config.train.batch_size, config.prior_share)
    draws = {name: float(share) for name, share in expected_draws(classes, steps * rows).items()}
    states = config.render.states.draws
    epochs = {name: draws[name] / (pictures[name] * states) for name in draws}
    return Outlook(pictures, draws, epochs, steps * config.train.batch_size)


def show(config: Config) -> None:
    """Print the table and the cost; raises `Refused` for overlaps, empty classes and impossible quotas."""
    classes = load_classes(config.classes)
    found = outlook(classes, config)
    prompts = search(config.prompts, config.seed, "train", classes, found.pictures) if config.prompts else None
    cached = in_cache(classes, config.run / "cache") if config.run else None
    console = Console()
    console.print(table(classes, found, prompts, cached))
    console.print("\n".join(cost(classes, config, found)), soft_wrap=True, highlight=False, markup=False)
    if prompts:
        console.print(f"prompts   the first {prompts.looked_at:,} of the source hold them all", highlight=False)


def table(classes: ClassFile, found: Outlook, prompts: Found | None, cached: Counter[str] | None) -> Table:
    """A row for each class."""
    shown = Table(box=SIMPLE, pad_edge=False)
    for head in ("class", "prompts"):
        shown.add_column(head, overflow="fold")
    heads = ["weight", "share %", "pictures", "draws", "epochs"]
    heads += ["distinct"] if prompts else []
    heads += ["in cache"] if cached is not None else []
    for head in heads:
        shown.add_column(head, justify="right")
    for spec in classes.classes:
        name = spec.name
        cells = [f"{spec.priority} {classes.relative(spec):g}", f"{100 * classes.weight(spec):.1f}"]
        cells += [str(found.pictures[name]), f"{found.draws[name]:.1f}", f"{found.epochs[name]:.2f}"]
        cells += [str(len({prompt.text for prompt in prompts.prompts[name]}))] if prompts else []
        cells += ["?" if spec.tags else str(cached[name])] if cached is not None else []
        shown.add_row(escape(name), escape(spec.rule), *cells)
    return shown


def in_cache(classes: ClassFile, cache: Path) -> Counter[str] | None:
    """The train records of each class in the distillation cache, by its table; tags are not told there.

    None where there is no cache. Raises `Refused` naming a class, or a class's prior, that fits none of its records.
    """
    if not (cache / "manifest.json").is_file():
        return None
    looked = Looked.open(cache)
    first = looked.rows("train")[looked.draw[looked.rows("train")] == 0]
    names = Counter(looked.class_names[number] for number in looked.column("class", first))
    found = Counter[str]()
    for name, records in names.items():
        owner = classes.owner(name)
        found[owner.name if owner else ""] += records
    prior_weights(classes, lambda: list(names.elements()))
    return found


def cost(classes: ClassFile, config: Config, found: Outlook) -> list[str]:
    """What there is to do, in pictures, samples and, where an earlier run measured its speed, time."""
    whole, states = sum(found.pictures.values()), config.render.states
    done = painted(classes, config)
    calls = 2 * (states.steps + states.renoised_states)
    lines = [
        f"to paint  {whole - done:,} of {whole:,} pictures ({(whole - done) * states.draws:,} states, "
        f"{(whole - done) * calls:,} answers of the teacher)",
        f"to train  {found.samples:,} samples, {round(sum(found.draws.values())):,} of them of the classes",
    ]
    for folder in ("classes", "distill"):
        journal = config.run / folder / "journal.jsonl" if config.run else None
        if journal and journal.is_file():
            rate = speed(journal)
            lines.append(
                f"time      {found.samples / rate / 60:.1f} minutes to train at the {rate:.0f} samples/s of {journal}"
            )
            return lines
    return [*lines, "time      not told: no journal of an earlier run"]


def speed(journal: Path) -> float:
    """Samples per second: the median of a journal's lines."""
    try:
        lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
        return statistics.median(float(line["samples_per_second"]) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{journal}: tells no speed ({error}) - remove it, or leave --run out") from error


def painted(classes: ClassFile, config: Config) -> int:
    """Pictures of this very class file that lie in RUN/classes/cache already."""
    cache = config.run / "classes" / "cache" if config.run else None
    if cache is None or config.prompts is None or not (cache / "manifest.json").is_file():
        return 0
    manifest = Manifest.open(cache)
    asked = identity(config.prompts, config.seed, classes, config.count)
    same = manifest.recipe.identity["prompts"] == asked
    return sum(shard.records for shard in manifest.of("train")) if same else 0
