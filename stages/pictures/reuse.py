"""Records of the distillation cache that show a class already: they need not be painted again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import JsonValue

from shards.manifest import Manifest
from shards.reader import Reader
from shards.recipe import Recipe, differences
from stages.classes import ClassFile, ClassSpec
from stages.prompts import Prompt

COMPANY = ("records_per_shard", "batch_size")
"""Of the settings of rendering, those that change a record by rounding at most."""


@dataclass(frozen=True)
class Cached(Prompt):
    """A prompt whose record lies in the distillation cache."""

    number: int = field(kw_only=True)
    """its place in the train split"""


def reusable(cache: Path, classes: ClassFile, most: Mapping[str, int]) -> dict[str, list[Cached]]:
    """The first records of each class in the train split of a cache, up to so many of each."""
    found: dict[str, list[Cached]] = {name: [] for name in most}
    if not any(most.values()):
        return found
    owners: dict[str, ClassSpec | None] = {}
    for number, head in enumerate(Reader(cache).heads()):
        name = head.class_name
        if name not in owners:
            owners[name] = _owner(classes, name)
        owner = owners[name]
        if owner and len(found[owner.name]) < most[owner.name]:
            found[owner.name].append(Cached(head.text, name, 0, number=number))
    return found


def unlike(cache: Path, recipe: Recipe) -> list[str]:
    """How the records of a cache differ from those that this recipe makes, but for their prompts."""
    return differences(_kind(Manifest.open(cache).recipe), _kind(recipe))


def _kind(recipe: Recipe) -> Recipe:
    render = recipe.identity["render"]
    told: dict[str, JsonValue] = {name: value for name, value in recipe.identity.items() if name != "prompts"}
    if isinstance(render, dict):
        told["render"] = {name: value for name, value in render.items() if name not in COMPANY}
    return Recipe(schema_version=recipe.schema_version, identity=told)


def _owner(classes: ClassFile, class_name: str) -> ClassSpec | None:
    """The class that a cached record surely belongs to: it keeps no tags, so a class told by some might own it."""
    for spec in classes.classes:
        if spec.tags and (spec.pattern is None or fnmatchcase(class_name, spec.pattern)):
            return None
    return classes.owner(class_name)
