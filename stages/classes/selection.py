"""Finding the prompts of each class in a source.

Prompts that no class owns: what has to stay as it was.

How many pictures each class gets.

How often each class is drawn: its share is w_c / sum w, and all of its samples are alike.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import islice

from pydantic import JsonValue

from stages.classes.specification import ClassFile, ClassSpec
from stages.prompts import Prompt, PromptSource, Split, source_identity, split_of
from stages.system.refusal import Refused, did_you_mean

BASE_SEARCH_LIMIT, SEARCH_LIMIT_PER_PROMPT = 20_000, 200
CLASS_MARK = "@"
"""Stands before a class's name, in the class name of its pictures that no pattern tells: those told by tags, of which
records keep none, and photographs."""


@dataclass(frozen=True)
class PromptSearch:
    """The prompts of each class, and how far the source was read for them."""

    prompts: Mapping[str, Sequence[Prompt]]
    class_names: Mapping[str, Counter[str]]
    """For each class, the class names of the prompts of both splits that it owns, and how often they came."""
    prompts_read: int


def search_prompts(
    source: PromptSource, seed: int, split: Split, classes: ClassFile, quotas: Mapping[str, int]
) -> PromptSearch:
    """The first prompts of each class, in the source's order.

    Raises `Refused` naming a class that has too few, or two classes that claim one of the prompts looked at.
    """
    found: dict[str, list[Prompt]] = {spec.name: [] for spec in classes.classes}
    names = {spec.name: Counter[str]() for spec in classes.classes}
    seen, missing, looked_at = Counter[str](), sum(quotas.values()), 0
    owners = OwnerLookup(classes)
    for prompt in source.iter_prompts(seed):
        if missing == 0:
            break
        if looked_at > BASE_SEARCH_LIMIT + SEARCH_LIMIT_PER_PROMPT * sum(quotas.values()):
            short = next(spec for spec in classes.classes if len(found[spec.name]) < quotas[spec.name])
            count = f"class {short.name!r}: {len(found[short.name])} of {quotas[short.name]} prompts found"
            raise Refused(f"{count} among {looked_at} - {_shortage_reason(short, found[short.name], seen, classes)}")
        looked_at += 1
        seen[prompt.class_name] += 1
        owner = owners.owner_of(prompt)
        if owner is None:
            continue
        names[owner.name][prompt.class_name] += 1
        if len(found[owner.name]) < quotas[owner.name] and split_of(prompt.text) == split:
            found[owner.name].append(_mark_owner(prompt, owner))
            missing -= 1
    return PromptSearch(found, names, looked_at)


def class_prompts(
    source: PromptSource, seed: int, split: Split, classes: ClassFile, quotas: Mapping[str, int]
) -> dict[str, list[Prompt]]:
    """The prompts of `search` alone."""
    return {
        name: list(prompts) for name, prompts in search_prompts(source, seed, split, classes, quotas).prompts.items()
    }


def prompts_identity(source: PromptSource, seed: int, classes: ClassFile, count: int) -> dict[str, JsonValue]:
    """What the list of prompts to be painted depends on, for a recipe."""
    return {**source_identity(source, seed), "classes": classes.sha256(), "count": count}


class OwnerLookup:
    """The owner of each prompt of a stream, worked out once for all prompts that the classes cannot tell apart."""

    def __init__(self, classes: ClassFile) -> None:
        self.classes = classes
        self._tag_choices = sorted({choice for spec in classes.classes for choice in spec.tags or {}})
        self._owner_cache: dict[tuple[str | None, ...], ClassSpec | None] = {}

    def owner_of(self, prompt: Prompt) -> ClassSpec | None:
        """The class that a prompt belongs to, if any."""
        said = dict(prompt.derivation)
        key = (prompt.class_name, *(said.get(choice) for choice in self._tag_choices))
        if key not in self._owner_cache:
            self._owner_cache[key] = self.classes.owner(prompt.class_name, said)
        return self._owner_cache[key]


def owner_of_record(classes: ClassFile, class_name: str) -> ClassSpec | None:
    """The class that a record of its pictures belongs to, told by its class name alone."""
    _, mark, name = class_name.rpartition(CLASS_MARK)
    named = [spec for spec in classes.classes if mark and (spec.tags or spec.images) and spec.name == name]
    return named[0] if named else classes.owner(class_name)


def _mark_owner(prompt: Prompt, owner: ClassSpec) -> Prompt:
    return replace(prompt, class_name=f"{prompt.class_name}{CLASS_MARK}{owner.name}") if owner.tags else prompt


def _shortage_reason(spec: ClassSpec, found: Sequence[Prompt], name_counts: Counter[str], classes: ClassFile) -> str:
    """Why a class has too few prompts."""
    if found:
        return "ask for fewer pictures of it, or of a source that speaks more of it"
    if spec.tags:
        return f"nothing there fits {spec.rule}, or a more specific class owns it: see `sollune prompts show N --tree`"
    fitting = [name for name in name_counts if spec.claims(name)]
    if not fitting:
        return (
            f"{spec.pattern} fits none of the class names there: "
            f"{did_you_mean(spec.pattern or '', _most_frequent(name_counts))}"
        )
    owners = sorted({owner.name for name in fitting if (owner := classes.owner(name))})
    return f"{', '.join(map(repr, owners))} is more specific and owns all that fits {spec.pattern}"


def _most_frequent(name_counts: Counter[str]) -> list[str]:
    """The class names that came most often, as many as a line holds."""
    return [name for name, _ in name_counts.most_common(8)]


OUTSIDE_LABEL = "(outside)"
"""Stands for them in tables."""


def outside_prompts(source: PromptSource, seed: int, split: Split, classes: ClassFile, count: int) -> list[Prompt]:
    """The first prompts outside all classes, `count` of them or as many as a long look finds."""
    owners, looked_at = OwnerLookup(classes), BASE_SEARCH_LIMIT + SEARCH_LIMIT_PER_PROMPT * count
    seen = islice(source.iter_prompts(seed), looked_at)
    outside = (prompt for prompt in seen if split_of(prompt.text) == split and owners.owner_of(prompt) is None)
    return list(islice(outside, count))


DEFAULT_PICTURES = 300
"""In all, unless told."""


def picture_quotas(classes: ClassFile, total: int) -> dict[str, int]:
    """Pictures to be had of prompts, `total` in all, in the file's order; raises `Refused` when that cannot be.

    A class that says `pictures` gets just these, one of nothing but photographs gets 0. The others share what is left
    by weight, w_c / sum w of these others: whole pictures first, then one each to the largest remainders, the earlier
    class where two are equal.
    """
    told = {spec.name: spec.pictures for spec in classes.classes if spec.pictures is not None}
    sharing = [spec for spec in classes.classes if spec.has_prompts and spec.pictures is None]
    if not told and not sharing:
        return {spec.name: 0 for spec in classes.classes}
    left = total - sum(told.values())
    if left < 0 or (left > 0 and not sharing):
        asked = ", ".join(f"{name} {pictures}" for name, pictures in told.items())
        raise Refused(
            f"classes ask for {sum(told.values())} pictures ({asked}), count is {total} - "
            f"set count to {sum(told.values())}, or change their `pictures`"
        )
    whole = sum(Fraction(classes.relative_weight(spec)) for spec in sharing)
    exact = {spec.name: left * Fraction(classes.relative_weight(spec)) / whole for spec in sharing}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: left - sum(shares.values())]:
        shares[name] += 1
    empty = [name for name, share in shares.items() if share == 0]
    if empty:
        raise Refused(
            f"class {empty[0]!r} gets none of {total} pictures (its share is {float(exact[empty[0]]):.2f}) - "
            "ask for more pictures or raise its priority"
        )
    return {spec.name: (told | shares).get(spec.name, 0) for spec in classes.classes}


def expected_samples(classes: ClassFile, samples: int) -> dict[str, Fraction]:
    """Exactly how many of so many draws each class gets on average: n w_c / sum w.

    Draws are with replacement (`WeightedOrder`), so a count's deviation is sqrt(n p (1 - p)).
    """
    whole = sum(Fraction(classes.relative_weight(spec)) for spec in classes.classes)
    return {spec.name: samples * Fraction(classes.relative_weight(spec)) / whole for spec in classes.classes}


def sampling_weights(classes: ClassFile, records: Counter[str]) -> dict[str, float]:
    """The share of the stream that each class name gets: its class's share, spread evenly over the class's records.

    `records` counts the records of each class name; raises `Refused` naming a class that has none.
    """
    owners = {name: owner_of_record(classes, name) for name in records}
    in_class = Counter[str]()
    for name, spec in owners.items():
        in_class[spec.name if spec else ""] += records[name]
    for spec in classes.classes:
        if not in_class[spec.name]:
            raise Refused(f"class {spec.name!r}: no record among {records.total()} fits {spec.rule} - paint some")
    return {
        name: classes.sampling_share(spec) * records[name] / in_class[spec.name] if spec else 0.0
        for name, spec in owners.items()
    }


def prior_sampling_weights(classes: ClassFile, class_names: Callable[[], Sequence[str]]) -> dict[str, float] | None:
    """The share of the prior rows that each class name of the distillation cache gets; None where all are alike.

    A class with a `prior_class` brings its share p_c to the records that fit it; the shares of the others go to all
    records. `class_names` lists the class of each record, and is not asked where no class has a prior. Raises `Refused`
    naming a class whose prior fits none.
    """
    if all(spec.prior_class is None for spec in classes.classes):
        return None
    records = Counter(class_names())
    weights = dict.fromkeys(records, 0.0)
    for spec in classes.classes:
        fitting = [name for name in records if spec.prior_class is None or fnmatchcase(name, spec.prior_class)]
        if not fitting:
            raise Refused(
                f"class {spec.name!r}: prior_class {spec.prior_class} fits no record of the cache - "
                f"{did_you_mean(spec.prior_class or '', list(records)[:20])}"
            )
        whole = sum(records[name] for name in fitting)
        for name in fitting:
            weights[name] += classes.sampling_share(spec) * records[name] / whole
    return weights
