"""The pictures of the classes: which are generated, reused from RUN/cache or photographs; and their records."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache as cache_once
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue

from configs.values import PictureSize, Strict
from shards.manifest import Manifest, Recipe, differences
from shards.reader import Reader
from shards.record import Record
from stages.cache.fill import RecordMaker
from stages.cache.sizes import RenderSizes
from stages.cache.targets import StatesConfig, make_records, records_from_pictures
from stages.classes.ledger import LearningTarget, PictureSource
from stages.classes.photographs import (
    Photograph,
    crop_lines,
    hidden_file_lines,
    list_photographs,
    load_photographs,
    nearest_size,
)
from stages.classes.selection import picture_quotas, search_prompts
from stages.classes.specification import ClassFile, ClassSpec
from stages.nets.teacher import Teacher
from stages.prompts import Prompt, PromptSource, derived_seed, omission_lines, truncation_lines
from stages.system.refusal import Refused

BATCHING_FIELDS = ("records_per_shard", "batch_size")
"""Settings of rendering that change a record by rounding at most."""


class PicturesConfig(Strict):
    """Where the pictures of the classes come from, and their learning targets."""

    variants: int = Field(
        1, ge=1, description="pictures of each generated prompt, each with its own noise and guidance"
    )
    reuse: float = Field(1.0, ge=0, le=1, description="largest share of a class's pictures taken from RUN/cache")
    painted: LearningTarget = Field(
        "teacher",
        description="target of generated pictures: the teacher's velocities, which changes only what was not learnt; "
        "or data: sampling at their guidance scale has to give them, which takes fewer steps",
    )
    reused: LearningTarget = Field(
        "teacher", description="target of pictures from RUN/cache: teacher or data, likewise"
    )
    photograph: LearningTarget = Field("data", description="target of photographs: data, or teacher for its velocities")
    guidance: float = Field(
        1.0, ge=1, description="guidance scale of photographs in sampling; 1, as in dreambooth, teaches v_cond itself"
    )
    fit_steps: int = Field(
        0, ge=0, description="optimization steps that fit a photograph's latents to the decoder; 0 uses the encoder's"
    )

    def max_reused(self, quotas: Mapping[str, int]) -> dict[str, int]:
        """How many of the pictures of each class may be taken from the cache."""
        return {name: int(self.reuse * pictures) for name, pictures in quotas.items()}

    def target_for(self, source: PictureSource) -> LearningTarget:
        """The learning target of pictures from this source."""
        return {"painted": self.painted, "reused": self.reused, "photograph": self.photograph}[source]

    def refuse_low_guidance(self, min_guidance: float) -> None:
        """Raise `ValueError` where generated pictures learn from the data at a guidance scale below 1."""
        if self.painted == "data" and min_guidance < 1:
            raise ValueError(
                f"pictures.painted = data, but they are generated at guidance {min_guidance:g} and above, and below 1 "
                "a prompt hardly shows - set render.states.guidance_min to 1 or more, or pictures.painted to teacher"
            )


@dataclass(frozen=True)
class CachedPrompt(Prompt):
    """A prompt with a record in the distillation cache."""

    record_number: int = field(kw_only=True)
    """its place in the train split"""
    size: PictureSize | None = field(default=None, kw_only=True)
    """of its picture; none in a cache of early versions, where it is the teacher's own"""


@dataclass(frozen=True)
class PicturePlan:
    """Every picture of the classes; a picture's key is its number, and pictures of one source are consecutive."""

    prompts: Sequence[Prompt]
    class_of: Sequence[str]
    """the class of each, by its name in the class file"""
    recipe: Recipe

    def source_at(self, number: int) -> PictureSource:
        """The source of a picture."""
        return _source_of(self.prompts[number])

    def counts_by_source(self) -> Counter[tuple[str, PictureSource]]:
        """Pictures of each class from each source."""
        return Counter(zip(self.class_of, map(_source_of, self.prompts), strict=True))

    def class_lines(self, classes: ClassFile) -> list[str]:
        """A line for each class: its priority, its share of training, and its pictures by source."""
        counts, lines = self.counts_by_source(), []
        for spec in classes.classes:
            pictures = ", ".join(f"{count} {source}" for (name, source), count in counts.items() if name == spec.name)
            share = f"{100 * classes.sampling_share(spec):.0f} % of the samples"
            lines.append(f"class {spec.name}: {spec.priority}, {share}, pictures: {pictures}")
        return lines

    def crop_lines(self, sizes: Sequence[PictureSize]) -> list[str]:
        """A line for each class whose photographs are cropped to the nearest of these sizes."""
        by_class: dict[str, list[Photograph]] = {}
        for name, one in zip(self.class_of, self.prompts, strict=True):
            if isinstance(one, Photograph):
                by_class.setdefault(name, []).append(one)
        return [line for name, own in by_class.items() for line in crop_lines(name, own, sizes)]

    def truncation_lines(self, tokenizer: Any) -> list[str]:
        """A line about prompts and captions longer than this tokenizer's limit."""
        named = [(str(one.file) if isinstance(one, Photograph) else repr(one.text), one.text) for one in self.prompts]
        return truncation_lines(tokenizer, named)


def _source_of(prompt: Prompt) -> PictureSource:
    if isinstance(prompt, Photograph):
        return "photograph"
    return "reused" if isinstance(prompt, CachedPrompt) else "painted"


def plan_pictures(
    classes: ClassFile, source: PromptSource, seed: int, count: int, config: PicturesConfig, cache: Path, recipe: Recipe
) -> PicturePlan:
    """All pictures: `count` from prompts, shared by priority, and the photographs.

    `recipe` describes how records are made and of which prompts; the plan's recipe describes the other pictures too.
    Raises `Refused` naming a class without prompts, or a file that cannot be used.
    """
    photographs = {spec.name: list_photographs(spec) for spec in classes.classes}
    quotas = picture_quotas(classes, count)
    limits = config.max_reused(quotas)
    if any(limits.values()) and (changed := recipe_differences(cache, recipe)):
        print(f"{cache}: nothing of it is used again, it was made otherwise: {'; '.join(changed)}")
        limits = dict.fromkeys(limits, 0)
    cached = find_reusable(cache, classes, limits)
    missing = {name: quotas[name] - len(cached[name]) for name in quotas}
    wanted = {name: -(-pictures // config.variants) for name, pictures in missing.items()}
    search = search_prompts(source, seed, "train", classes, wanted)
    generated = {name: _make_variants(own, config.variants)[: missing[name]] for name, own in search.prompts.items()}
    hidden = [line for spec in classes.classes for line in hidden_file_lines(spec)]
    for line in [*hidden, *omission_lines(source.unusable_rows(search.prompts_read))]:
        print(line)

    groups = [(name, own) for by_class in (generated, cached, photographs) for name, own in by_class.items()]
    prompts, names = [one for _, own in groups for one in own], [name for name, own in groups for _ in own]
    return PicturePlan(prompts, names, _extend_recipe(recipe, config, cache, prompts))


def size_of_picture(prompt: Prompt, sizes: RenderSizes) -> PictureSize:
    """The size of a picture: drawn from its prompt's seed, that of a reused record, or a photograph's nearest."""
    if isinstance(prompt, Photograph):
        return nearest_size(prompt.upright_size, sizes.listed)
    if isinstance(prompt, CachedPrompt):
        return prompt.size or sizes.native
    return sizes.size_of(prompt)


def find_reusable(cache: Path, classes: ClassFile, limits: Mapping[str, int]) -> dict[str, list[CachedPrompt]]:
    """The first records of each class in the train split of a cache, up to a limit for each."""
    reusable: dict[str, list[CachedPrompt]] = {name: [] for name in limits}
    if not any(limits.values()):
        return reusable
    owner_of = cache_once(lambda class_name: _certain_owner(classes, class_name))
    for number, head in enumerate(Reader(cache).headers()):
        owner = owner_of(head.class_name)
        if owner and len(reusable[owner.name]) < limits[owner.name]:
            reusable[owner.name].append(
                CachedPrompt(head.text, head.class_name, 0, record_number=number, size=head.size)
            )
    return reusable


def _certain_owner(classes: ClassFile, class_name: str) -> ClassSpec | None:
    """The class of a cached record; None where a class with tags might own it, since records store no tags."""
    for spec in classes.classes:
        if spec.tags and (spec.pattern is None or fnmatchcase(class_name, spec.pattern)):
            return None
    return classes.owner(class_name)


def recipe_differences(cache: Path, recipe: Recipe) -> list[str]:
    """How the records of a cache differ from those of this recipe, apart from their prompts."""
    return differences(_comparable_recipe(Manifest.open(cache).recipe), _comparable_recipe(recipe))


def _comparable_recipe(recipe: Recipe) -> Recipe:
    render: Any = recipe.identity["render"]
    identity: dict[str, JsonValue] = {name: value for name, value in recipe.identity.items() if name != "prompts"}
    if isinstance(render, dict):
        kept = {name: value for name, value in render.items() if name not in BATCHING_FIELDS}
        if isinstance(states := render.get("states"), dict):  # landings change nothing else, and are left behind
            kept["states"] = {name: value for name, value in states.items() if name != "windows"}
        identity["render"] = kept
    return Recipe(schema_version=recipe.schema_version, identity=identity)


def _make_variants(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Each prompt `count` times, first as it is, then with seeds derived from its own."""
    return [
        replace(prompt, seed=derived_seed("variant", prompt.seed, i)) if i else prompt
        for prompt in prompts
        for i in range(count)
    ]


def _extend_recipe(recipe: Recipe, config: PicturesConfig, cache: Path, prompts: Sequence[Prompt]) -> Recipe:
    """The recipe with all else that decides the bytes; what is not used adds nothing."""
    added: dict[str, JsonValue] = {}
    if config.variants > 1:
        added["variants"] = config.variants
    if numbers := [one.record_number for one in prompts if isinstance(one, CachedPrompt)]:
        made_by = Manifest.open(cache).recipe.fingerprint()
        added["reused"] = {"count": len(numbers), "numbers": _sha256(numbers), "recipe": made_by}
    if own := [[one.sha256, one.text, one.class_name] for one in prompts if isinstance(one, Photograph)]:
        fitted = {"fit_steps": config.fit_steps} if config.fit_steps else {}
        added["photographs"] = {"count": len(own), "sha256": _sha256(own), **fitted}
    return recipe.model_copy(update={"identity": recipe.identity | added})


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def picture_record_maker(teacher: Teacher, cache: Path, config: StatesConfig, fit_steps: int = 0) -> RecordMaker:
    """A function (prompts, keys) -> records for pictures of all sources; those of one source form one batch.

    `cache` is the distillation cache; `fit_steps` fit the latents of photographs to the decoder.
    """
    reader = cache_once(lambda: Reader(cache))

    def make(source: PictureSource, prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        if source == "painted":
            return make_records(teacher, prompts, keys, config, size)
        if source == "reused":
            return [_reused_record(reader(), prompt, key, size) for prompt, key in zip(prompts, keys, strict=True)]
        photographs = [one for one in prompts if isinstance(one, Photograph)]
        pictures = load_photographs(photographs, size)
        if fit_steps:
            x0 = torch.stack([teacher.fit_latents(picture, fit_steps) for picture in pictures])
        else:
            x0 = teacher.encode_pictures(pictures)
        return records_from_pictures(teacher, prompts, keys, x0, config)

    def make_all(prompts: Sequence[Prompt], keys: Sequence[str], size: PictureSize) -> list[Record]:
        rows: dict[PictureSource, list[tuple[Prompt, str]]] = {}
        for prompt, key in zip(prompts, keys, strict=True):
            rows.setdefault(_source_of(prompt), []).append((prompt, key))
        records: dict[str, Record] = {}
        for source, pairs in rows.items():
            of_source = make(source, [prompt for prompt, _ in pairs], [key for _, key in pairs], size)
            records |= {record.key: record for record in of_source}
        return [records[key] for key in keys]

    return make_all


def _reused_record(reader: Reader, prompt: Prompt, key: str, size: PictureSize) -> Record:
    """A record of the distillation cache under a new key, without landings; early versions did not store its size."""
    record = reader.record_at(prompt.record_number) if isinstance(prompt, CachedPrompt) else None
    if record is None or record.text != prompt.text:
        raise Refused(f"{reader.folder}: changed while it was read - start the command again")
    return replace(record, key=key, size=size, landings=None)
