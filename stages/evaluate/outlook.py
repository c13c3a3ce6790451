"""What a class file will mean: pictures, draws and epochs of each class, and what the run's cache holds of it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, Field

from configs.strict import Strict
from stages.classes import PICTURES, ClassFile, expected_draws, prior_weights, quotas
from stages.evaluate.cached import records_by_class
from stages.pictures import PicturesConfig, photographs
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
    pictures: PicturesConfig = Field(PicturesConfig(), description="where the pictures come from")
    prior_share: float = Field(PRIOR_SHARE, gt=0, lt=1, description="share of each batch from the distillation cache")
    train: TrainConfig = Field(TrainConfig(), description="how long the training is")


@dataclass(frozen=True)
class Outlook:
    """The numbers of a class file; everything by class name but the last."""

    pictures: dict[str, int]
    """Had of prompts: painted, or taken from the cache."""
    photographs: dict[str, int]
    draws: dict[str, float]
    """Expected rows of the training; exact, before they are rounded to a float."""
    epochs: dict[str, float]
    """Expected draws over the states that the class's pictures hold."""
    samples: int
    """Rows of the whole training, those of the prior too."""


def outlook(classes: ClassFile, config: Config) -> Outlook:
    """The numbers; raises `Refused` for quotas that cannot be met and photographs that cannot be used."""
    pictures = quotas(classes, config.count)
    rows, _ = rows_of(config.train.batch_size, config.prior_share)
    draws = {name: float(share) for name, share in expected_draws(classes, config.train.steps * rows).items()}
    states = config.render.states.draws
    own = {spec.name: len(photographs(spec)) for spec in classes.classes}
    epochs = {name: draws[name] / ((pictures[name] + own[name]) * states) for name in draws}
    return Outlook(pictures, own, draws, epochs, config.train.samples)


def in_cache(classes: ClassFile, cache: Path) -> Counter[str] | None:
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
    prior_weights(classes, lambda: list(names.elements()))
    return found
