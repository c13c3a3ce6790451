"""Records of the distillation cache that show a class already: they need not be painted again.

Which pictures the classes get, where each comes from, and what is learnt from it.

Wanted pictures -> records, whichever way each is had.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache as cache_once
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import Field, JsonValue

from configs.values import Strict
from shards.manifest import Manifest, Recipe, differences
from shards.reader import Reader
from shards.record import Record
from stages.cache.fill import RecordMaker
from stages.cache.targets import StatesConfig, make_records, records_from_pictures
from stages.classes import ClassFile, ClassSpec, picture_quotas, search_prompts
from stages.classes.ledger import LearningTarget, PictureSource
from stages.classes.photographs import Photograph, hidden_file_lines, list_photographs, load_photographs
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource, derived_seed, omission_lines, truncation_lines
from stages.system.refusal import Refused

BATCHING_FIELDS = ("records_per_shard", "batch_size")
"""Of the settings of rendering, those that change a record by rounding at most."""


@dataclass(frozen=True)
class CachedPrompt(Prompt):
    """A prompt whose record lies in the distillation cache."""

    record_number: int = field(kw_only=True)
    """its place in the train split"""


def find_reusable(cache: Path, classes: ClassFile, limits: Mapping[str, int]) -> dict[str, list[CachedPrompt]]:
    """The first records of each class in the train split of a cache, up to so many of each."""
    found: dict[str, list[CachedPrompt]] = {name: [] for name in limits}
    if not any(limits.values()):
        return found
    owners: dict[str, ClassSpec | None] = {}
    for number, head in enumerate(Reader(cache).headers()):
        name = head.class_name
        if name not in owners:
            owners[name] = _certain_owner(classes, name)
        owner = owners[name]
        if owner and len(found[owner.name]) < limits[owner.name]:
            found[owner.name].append(CachedPrompt(head.text, name, 0, record_number=number))
    return found


def recipe_differences(cache: Path, recipe: Recipe) -> list[str]:
    """How the records of a cache differ from those that this recipe makes, but for their prompts."""
    return differences(_comparable_recipe(Manifest.open(cache).recipe), _comparable_recipe(recipe))


def _comparable_recipe(recipe: Recipe) -> Recipe:
    render = recipe.identity["render"]
    told: dict[str, JsonValue] = {name: value for name, value in recipe.identity.items() if name != "prompts"}
    if isinstance(render, dict):
        told["render"] = {name: value for name, value in render.items() if name not in BATCHING_FIELDS}
    return Recipe(schema_version=recipe.schema_version, identity=told)


def _certain_owner(classes: ClassFile, class_name: str) -> ClassSpec | None:
    """The class that a cached record surely belongs to: it keeps no tags, so a class told by some might own it."""
    for spec in classes.classes:
        if spec.tags and (spec.pattern is None or fnmatchcase(class_name, spec.pattern)):
            return None
    return classes.owner(class_name)


class PicturesConfig(Strict):
    """Where the pictures of the classes come from, and what is learnt from them."""

    variants: int = Field(
        1, ge=1, description="pictures painted of each prompt, each with a noise and a guidance scale of its own"
    )
    reuse: float = Field(
        1.0,
        ge=0,
        le=1,
        description="largest share of a class's pictures that is taken from RUN/cache, not painted again",
    )
    painted: LearningTarget = Field(
        "teacher",
        description="what painted pictures teach: the teacher's velocities, so that nothing changes but what was "
        "not learnt; or data: guidance at the scale that painted them is to draw them, which takes fewer steps",
    )
    reused: LearningTarget = Field("teacher", description="what pictures of RUN/cache teach: teacher or data, likewise")
    photograph: LearningTarget = Field(
        "data", description="what photographs teach: data, or teacher for its answers there"
    )
    guidance: float = Field(
        1.0,
        ge=1,
        description="guidance scale under which photographs are to be drawn; 1, as in dreambooth, teaches the "
        "conditional branch itself, and most",
    )
    fit_steps: int = Field(
        0,
        ge=0,
        description="steps that bring a photograph's latents to what the decoder draws it of; 0 takes the encoder's, "
        "which may not know what is shown",
    )

    def max_reused(self, quotas: Mapping[str, int]) -> dict[str, int]:
        """How many of the pictures of each class may be taken from the cache."""
        return {name: int(self.reuse * pictures) for name, pictures in quotas.items()}

    def target_for(self, source: PictureSource) -> LearningTarget:
        """What is learnt from pictures of this source."""
        return {"painted": self.painted, "reused": self.reused, "photograph": self.photograph}[source]

    def refuse_low_guidance(self, min_guidance: float) -> None:
        """Raise `ValueError` where pictures that are painted at such a guidance scale cannot teach themselves."""
        if self.painted == "data" and min_guidance < 1:
            raise ValueError(
                f"pictures.painted = data, but they are painted at guidance {min_guidance:g} and above, and below "
                "1 a prompt "
                "hardly shows - set render.states.guidance_min to 1 or more, or pictures.painted to teacher"
            )


@dataclass(frozen=True)
class PicturePlan:
    """Every picture of the classes; a picture's key is its place, so what comes from where does not mix."""

    prompts: Sequence[Prompt]
    class_of: Sequence[str]
    """the name of the class of each, as the class file says it"""
    recipe: Recipe

    def source_at(self, number: int) -> PictureSource:
        """Where a picture comes from."""
        return picture_source(self.prompts[number])

    def counts_by_source(self) -> Counter[tuple[str, PictureSource]]:
        """Pictures of each class from each source."""
        return Counter((name, picture_source(one)) for name, one in zip(self.class_of, self.prompts, strict=True))

    def truncation_lines(self, tokenizer: Any) -> list[str]:
        """A line about prompts and captions whose end a teacher of this tokenizer does not read."""
        return truncation_lines(tokenizer, [(prompt_location(one), one.text) for one in self.prompts])


def picture_source(prompt: Prompt) -> PictureSource:
    """Where the picture of a prompt comes from: its kind tells."""
    if isinstance(prompt, Photograph):
        return "photograph"
    return "reused" if isinstance(prompt, CachedPrompt) else "painted"


def prompt_location(prompt: Prompt) -> str:
    """Where a prompt stands: a photograph's file, or else its own words."""
    return str(prompt.file) if isinstance(prompt, Photograph) else repr(prompt.text)


def plan_pictures(
    classes: ClassFile, source: PromptSource, seed: int, count: int, config: PicturesConfig, cache: Path, recipe: Recipe
) -> PicturePlan:
    """All pictures: `count` of prompts, shared by priority, and the photographs.

    `recipe` tells how records are made and of which prompts; the one returned tells of the other pictures too. Raises
    `Refused` naming a class without prompts, or a file that cannot be used.
    """
    own = {spec.name: list_photographs(spec) for spec in classes.classes}
    hidden = [line for spec in classes.classes for line in hidden_file_lines(spec)]
    quota = picture_quotas(classes, count)
    most = config.max_reused(quota)
    if any(most.values()) and (slips := recipe_differences(cache, recipe)):
        print(f"{cache}: nothing of it is used again, it was made otherwise: {'; '.join(slips)}")
        most = dict.fromkeys(most, 0)
    cached = find_reusable(cache, classes, most)
    left = {name: quota[name] - len(cached[name]) for name in quota}
    asked = {name: -(-pictures // config.variants) for name, pictures in left.items()}
    found = search_prompts(source, seed, "train", classes, asked)
    painted = {name: make_variants(prompts, config.variants)[: left[name]] for name, prompts in found.prompts.items()}
    for line in [*hidden, *omission_lines(source.unusable_rows(found.prompts_read))]:
        print(line)

    listed = [(name, one) for kind in (painted, cached, own) for name, prompts in kind.items() for one in prompts]
    prompts, names = [one for _, one in listed], [name for name, _ in listed]
    return PicturePlan(prompts, names, _extend_recipe(recipe, config, cache, prompts))


def make_variants(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Each prompt so many times, first as it is, then with seeds derived from its own."""
    return [
        replace(prompt, seed=derived_seed("variant", prompt.seed, i)) if i else prompt
        for prompt in prompts
        for i in range(count)
    ]


def _extend_recipe(recipe: Recipe, config: PicturesConfig, cache: Path, prompts: Sequence[Prompt]) -> Recipe:
    """The recipe with all else that decides the bytes; what is not asked for is not told."""
    told: dict[str, JsonValue] = {}
    if config.variants > 1:
        told["variants"] = config.variants
    if numbers := [one.record_number for one in prompts if isinstance(one, CachedPrompt)]:
        made_by = Manifest.open(cache).recipe.fingerprint()
        told["reused"] = {"count": len(numbers), "numbers": _sha256(numbers), "recipe": made_by}
    if own := [[one.sha256, one.text, one.class_name] for one in prompts if isinstance(one, Photograph)]:
        fitted = {"fit_steps": config.fit_steps} if config.fit_steps else {}
        told["photographs"] = {"count": len(own), "sha256": _sha256(own), **fitted}
    return recipe.model_copy(update={"identity": recipe.identity | told})


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


MakersBySource: TypeAlias = Mapping[PictureSource, RecordMaker]


def picture_record_maker(teacher: Teacher, cache: Path, config: StatesConfig, fit_steps: int = 0) -> RecordMaker:
    """What makes the records of a batch of wanted pictures.

    `cache` is the one that pictures are taken from; `fit_steps` fit the latents of photographs to the decoder.
    """

    def paint(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        return make_records(teacher, prompts, keys, config)

    def develop(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        shown = load_photographs(
            [one for one in prompts if isinstance(one, Photograph)], teacher.components.picture_pixels
        )
        x0 = (
            torch.stack([teacher.fit_latents(one, fit_steps) for one in shown])
            if fit_steps
            else teacher.encode_pictures(shown)
        )
        return records_from_pictures(teacher, prompts, keys, x0, config)

    return maker_by_source({"painted": paint, "reused": reused_record_maker(cache), "photograph": develop})


def maker_by_source(makers: MakersBySource) -> RecordMaker:
    """Each prompt by the maker of its source, all of one source in one batch."""

    def make(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        found: dict[str, Record] = {}
        for source, maker in makers.items():
            rows = [(one, key) for one, key in zip(prompts, keys, strict=True) if picture_source(one) == source]
            if rows:
                found |= {record.key: record for record in maker(*map(list, zip(*rows, strict=True)))}
        return [found[key] for key in keys]

    return make


def reused_record_maker(cache: Path) -> RecordMaker:
    """Records of a cache under new keys; the cache is opened when the first is asked for."""
    opened = cache_once(lambda: Reader(cache))

    def take(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        taken = []
        for prompt, key in zip(prompts, keys, strict=True):
            record = opened().record_at(prompt.record_number) if isinstance(prompt, CachedPrompt) else None
            if record is None or record.text != prompt.text:
                raise Refused(f"{cache}: changed while it was read - start the command again")
            taken.append(replace(record, key=key))
        return taken

    return take
