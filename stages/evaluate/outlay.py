"""What is left to do for a class file: pictures to paint, samples to train, and the time where it was once measured."""

import statistics
from pathlib import Path

from configs.refusal import Refused
from shards.manifest import Manifest
from stages.classes import ClassFile, identity
from stages.evaluate.outlook import Config, Outlook
from stages.pictures import reusable, unlike
from stages.train.journal import FILE, steps_told


def cost(classes: ClassFile, config: Config, found: Outlook) -> list[str]:
    """What there is to do, in pictures, samples and, where an earlier run measured its speed, time."""
    whole, states = sum(found.pictures.values()) - taken(classes, config, found), config.render.states
    missing = max(0, whole - painted(classes, config))  # those to be painted are the first in the cache
    calls = 2 * (states.steps + states.renoised_states)
    return [
        f"to paint  {missing:,} of {whole:,} pictures ({missing * states.draws:,} states, "
        f"{missing * calls:,} answers of the teacher)",
        f"to train  {found.samples:,} samples, {round(sum(found.draws.values())):,} of them of the classes",
        f"time      {time_to_train(config.run, found.samples)}",
    ]


def time_to_train(run: Path | None, samples: int) -> str:
    """Told by the newest story of the run that measured its speed."""
    for story in (run / "classes", run / "distill") if run else ():
        if (story / FILE).is_file():
            rate = speed(story)
            return f"{samples / rate / 60:.1f} minutes to train at the {rate:.0f} samples/s of {story / FILE}"
    return "not told: no journal of an earlier run"


def speed(story: Path) -> float:
    """Samples per second: the median of the lines about training in a story's journal."""
    try:
        return statistics.median(float(line["samples_per_second"]) for line in steps_told(story))
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{story / FILE}: tells no speed ({error}) - remove it, or leave --run out") from error


def taken(classes: ClassFile, config: Config, found: Outlook) -> int:
    """Pictures that RUN/cache gives, if it was rendered in the same way."""
    cache = config.run / "cache" if config.run else None
    if cache is None or not (cache / "manifest.json").is_file():
        return 0
    recipe = Manifest.open(cache).recipe
    asked = {**recipe.identity, "render": config.render.model_dump(mode="json")}
    if unlike(cache, recipe.model_copy(update={"identity": asked})):
        return 0
    return sum(map(len, reusable(cache, classes, config.pictures.most(found.pictures)).values()))


def painted(classes: ClassFile, config: Config) -> int:
    """Records of this very class file that lie in RUN/classes/cache; those of another are not counted."""
    cache = config.run / "classes" / "cache" if config.run else None
    if cache is None or config.prompts is None or not (cache / "manifest.json").is_file():
        return 0
    manifest = Manifest.open(cache)
    if manifest.recipe.identity["prompts"] != identity(config.prompts, config.seed, classes, config.count):
        return 0
    return sum(shard.records for shard in manifest.of("train"))
