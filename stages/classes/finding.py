"""Finding the prompts of each class in a source."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from configs.refusal import Refused, did_you_mean
from stages.classes.spec import ClassFile, ClassSpec
from stages.prompts import Prompt, PromptSource, Split, source_identity, split_of

LOOKED_AT, LOOKED_AT_PER_PROMPT = 20_000, 200
MARK = "@"
"""Stands before a class's name, in the class name of its pictures that no pattern tells: those told by tags, of which
records keep none, and photographs."""


@dataclass(frozen=True)
class Found:
    """The prompts of each class, and how far the source was read for them."""

    prompts: Mapping[str, Sequence[Prompt]]
    class_names: Mapping[str, Counter[str]]
    """For each class, the class names of the prompts of both splits that it owns, and how often they came."""
    looked_at: int


def search(source: PromptSource, seed: int, split: Split, classes: ClassFile, quotas: Mapping[str, int]) -> Found:
    """The first prompts of each class, in the source's order.

    Raises `Refused` naming a class that has too few, or two classes that claim one of the prompts looked at.
    """
    found: dict[str, list[Prompt]] = {spec.name: [] for spec in classes.classes}
    names = {spec.name: Counter[str]() for spec in classes.classes}
    seen, missing, looked_at = Counter[str](), sum(quotas.values()), 0
    owners = Owners(classes)
    for prompt in source.endless(seed):
        if missing == 0:
            break
        if looked_at > LOOKED_AT + LOOKED_AT_PER_PROMPT * sum(quotas.values()):
            short = next(spec for spec in classes.classes if len(found[spec.name]) < quotas[spec.name])
            count = f"class {short.name!r}: {len(found[short.name])} of {quotas[short.name]} prompts found"
            raise Refused(f"{count} among {looked_at} - {_reason(short, found[short.name], seen, classes)}")
        looked_at += 1
        seen[prompt.class_name] += 1
        owner = owners.of(prompt)
        if owner is None:
            continue
        names[owner.name][prompt.class_name] += 1
        if len(found[owner.name]) < quotas[owner.name] and split_of(prompt.text) == split:
            found[owner.name].append(_labelled(prompt, owner))
            missing -= 1
    return Found(found, names, looked_at)


def class_prompts(
    source: PromptSource, seed: int, split: Split, classes: ClassFile, quotas: Mapping[str, int]
) -> dict[str, list[Prompt]]:
    """The prompts of `search` alone."""
    return {name: list(prompts) for name, prompts in search(source, seed, split, classes, quotas).prompts.items()}


def identity(source: PromptSource, seed: int, classes: ClassFile, count: int) -> dict[str, JsonValue]:
    """What the list of prompts to be painted depends on, for a recipe."""
    return {**source_identity(source, seed), "classes": classes.sha256(), "count": count}


class Owners:
    """The owner of each prompt of a stream, worked out once for all prompts that the classes cannot tell apart."""

    def __init__(self, classes: ClassFile) -> None:
        self.classes = classes
        self._choices = sorted({choice for spec in classes.classes for choice in spec.tags or {}})
        self._known: dict[tuple[str | None, ...], ClassSpec | None] = {}

    def of(self, prompt: Prompt) -> ClassSpec | None:
        """The class that a prompt belongs to, if any."""
        said = dict(prompt.derivation)
        key = (prompt.class_name, *(said.get(choice) for choice in self._choices))
        if key not in self._known:
            self._known[key] = self.classes.owner(prompt.class_name, said)
        return self._known[key]


def owner_of_record(classes: ClassFile, class_name: str) -> ClassSpec | None:
    """The class that a record of its pictures belongs to, told by its class name alone."""
    _, mark, name = class_name.rpartition(MARK)
    named = [spec for spec in classes.classes if mark and (spec.tags or spec.images) and spec.name == name]
    return named[0] if named else classes.owner(class_name)


def _labelled(prompt: Prompt, owner: ClassSpec) -> Prompt:
    return replace(prompt, class_name=f"{prompt.class_name}{MARK}{owner.name}") if owner.tags else prompt


def _reason(short: ClassSpec, found: Sequence[Prompt], seen: Counter[str], classes: ClassFile) -> str:
    """Why a class has too few prompts."""
    if found:
        return "ask for fewer pictures of it, or of a source that speaks more of it"
    if short.tags:
        return f"nothing there fits {short.rule}, or a more specific class owns it: see `sollune prompts show N --tree`"
    fitting = [name for name in seen if short.claims(name)]
    if not fitting:
        return f"{short.pattern} fits none of the class names there: {did_you_mean(short.pattern or '', _some(seen))}"
    owners = sorted({owner.name for name in fitting if (owner := classes.owner(name))})
    return f"{', '.join(map(repr, owners))} is more specific and owns all that fits {short.pattern}"


def _some(seen: Counter[str]) -> list[str]:
    """The class names that came most often, as many as a line holds."""
    return [name for name, _ in seen.most_common(8)]
