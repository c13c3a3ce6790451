"""Which pictures the classes get, where each comes from, and what is learnt from it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from configs.strict import Strict
from shards.manifest import Manifest
from shards.recipe import Recipe
from stages.classes import ClassFile, quotas, search
from stages.pictures.ledger import Source, Target
from stages.pictures.photographs import Photograph, hidden_lines, photographs
from stages.pictures.reuse import Cached, reusable, unlike
from stages.prompts import Prompt, PromptSource, derived_seed, omission_lines, truncation_lines


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
    painted: Target = Field(
        "teacher",
        description="what painted pictures teach: the teacher's velocities, so that nothing changes but what was "
        "not learnt; or data: guidance at the scale that painted them is to draw them, which takes fewer steps",
    )
    reused: Target = Field("teacher", description="what pictures of RUN/cache teach: teacher or data, likewise")
    photograph: Target = Field("data", description="what photographs teach: data, or teacher for its answers there")
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

    def most(self, quotas: Mapping[str, int]) -> dict[str, int]:
        """How many of the pictures of each class may be taken from the cache."""
        return {name: int(self.reuse * pictures) for name, pictures in quotas.items()}

    def target(self, source: Source) -> Target:
        """What is learnt from pictures of this source."""
        return {"painted": self.painted, "reused": self.reused, "photograph": self.photograph}[source]

    def refuse_hardly_guided(self, least: float) -> None:
        """Raise `ValueError` where pictures that are painted at such a guidance scale cannot teach themselves."""
        if self.painted == "data" and least < 1:
            raise ValueError(
                f"pictures.painted = data, but they are painted at guidance {least:g} and above, and below 1 a prompt "
                "hardly shows - set render.states.guidance_min to 1 or more, or pictures.painted to teacher"
            )


@dataclass(frozen=True)
class Wanted:
    """Every picture of the classes; a picture's key is its place, so what comes from where does not mix."""

    prompts: Sequence[Prompt]
    class_of: Sequence[str]
    """the name of the class of each, as the class file says it"""
    recipe: Recipe

    def source(self, number: int) -> Source:
        """Where a picture comes from."""
        return source_of(self.prompts[number])

    def counts(self) -> Counter[tuple[str, Source]]:
        """Pictures of each class from each source."""
        return Counter((name, source_of(one)) for name, one in zip(self.class_of, self.prompts, strict=True))

    def truncation_lines(self, tokenizer: Any) -> list[str]:
        """A line about prompts and captions whose end a teacher of this tokenizer does not read."""
        return truncation_lines(tokenizer, [(place_of(one), one.text) for one in self.prompts])


def source_of(prompt: Prompt) -> Source:
    """Where the picture of a prompt comes from: its kind tells."""
    if isinstance(prompt, Photograph):
        return "photograph"
    return "reused" if isinstance(prompt, Cached) else "painted"


def place_of(prompt: Prompt) -> str:
    """Where a prompt stands: a photograph's file, or else its own words."""
    return str(prompt.file) if isinstance(prompt, Photograph) else repr(prompt.text)


def wanted(
    classes: ClassFile, source: PromptSource, seed: int, count: int, config: PicturesConfig, cache: Path, recipe: Recipe
) -> Wanted:
    """All pictures: `count` of prompts, shared by priority, and the photographs.

    `recipe` tells how records are made and of which prompts; the one returned tells of the other pictures too. Raises
    `Refused` naming a class without prompts, or a file that cannot be used.
    """
    own = {spec.name: photographs(spec) for spec in classes.classes}
    hidden = [line for spec in classes.classes for line in hidden_lines(spec)]
    quota = quotas(classes, count)
    most = config.most(quota)
    if any(most.values()) and (slips := unlike(cache, recipe)):
        print(f"{cache}: nothing of it is used again, it was made otherwise: {'; '.join(slips)}")
        most = dict.fromkeys(most, 0)
    cached = reusable(cache, classes, most)
    left = {name: quota[name] - len(cached[name]) for name in quota}
    asked = {name: -(-pictures // config.variants) for name, pictures in left.items()}
    found = search(source, seed, "train", classes, asked)
    painted = {name: variants(prompts, config.variants)[: left[name]] for name, prompts in found.prompts.items()}
    for line in [*hidden, *omission_lines(source.faults(found.looked_at))]:
        print(line)

    listed = [(name, one) for kind in (painted, cached, own) for name, prompts in kind.items() for one in prompts]
    prompts, names = [one for _, one in listed], [name for name, _ in listed]
    return Wanted(prompts, names, _told(recipe, config, cache, prompts))


def variants(prompts: Sequence[Prompt], each: int) -> list[Prompt]:
    """Each prompt so many times, first as it is, then with seeds derived from its own."""
    return [
        replace(prompt, seed=derived_seed("variant", prompt.seed, i)) if i else prompt
        for prompt in prompts
        for i in range(each)
    ]


def _told(recipe: Recipe, config: PicturesConfig, cache: Path, prompts: Sequence[Prompt]) -> Recipe:
    """The recipe with all else that decides the bytes; what is not asked for is not told."""
    told: dict[str, JsonValue] = {}
    if config.variants > 1:
        told["variants"] = config.variants
    if numbers := [one.number for one in prompts if isinstance(one, Cached)]:
        made_by = Manifest.open(cache).recipe.fingerprint()
        told["reused"] = {"count": len(numbers), "numbers": _sha256(numbers), "recipe": made_by}
    if own := [[one.sha256, one.text, one.class_name] for one in prompts if isinstance(one, Photograph)]:
        fitted = {"fit_steps": config.fit_steps} if config.fit_steps else {}
        told["photographs"] = {"count": len(own), "sha256": _sha256(own), **fitted}
    return recipe.model_copy(update={"identity": recipe.identity | told})


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
