"""Which prompts and records belong to each class, how many pictures it gets, and how often it is sampled."""

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
DEFAULT_PICTURES = 300
"""Pictures of all classes together."""
OUTSIDE_LABEL = "(outside)"
"""The row of prompts outside all classes, in tables."""
CLASS_MARK = "@"
"""Stands before the class in the class name of a picture whose class no pattern can restore: photographs, and pictures
of a class with tags, which records do not store."""


@dataclass(frozen=True)
class PromptSearch:
    """The prompts of each class, and how far the source was read for them."""

    prompts: dict[str, list[Prompt]]
    prompts_read: int


def search_prompts(
    source: PromptSource, seed: int, split: Split, classes: ClassFile, quotas: Mapping[str, int]
) -> PromptSearch:
    """The first prompts of each class, in the source's order.

    Raises `Refused` naming a class that has too few, or two classes that claim the same prompt.
    """
    prompts: dict[str, list[Prompt]] = {spec.name: [] for spec in classes.classes}
    name_counts, missing, read = Counter[str](), sum(quotas.values()), 0
    limit = BASE_SEARCH_LIMIT + SEARCH_LIMIT_PER_PROMPT * missing
    owner_of = _owner_lookup(classes)
    for prompt in source.iter_prompts(seed):
        if missing == 0:
            break
        if read > limit:
            short = next(spec for spec in classes.classes if len(prompts[spec.name]) < quotas[spec.name])
            count = f"class {short.name!r}: {len(prompts[short.name])} of {quotas[short.name]} prompts found"
            reason = _shortage_reason(short, prompts[short.name], name_counts, classes)
            raise Refused(f"{count} among {read} - {reason}")
        read += 1
        name_counts[prompt.class_name] += 1
        owner = owner_of(prompt)
        if owner and len(prompts[owner.name]) < quotas[owner.name] and split_of(prompt.text) == split:
            marked = f"{prompt.class_name}{CLASS_MARK}{owner.name}" if owner.tags else prompt.class_name
            prompts[owner.name].append(replace(prompt, class_name=marked))
            missing -= 1
    return PromptSearch(prompts, read)


def outside_prompts(source: PromptSource, seed: int, split: Split, classes: ClassFile, count: int) -> list[Prompt]:
    """The first prompts outside all classes: `count` of them, or as many as the search limit allows."""
    owner_of = _owner_lookup(classes)
    read = islice(source.iter_prompts(seed), BASE_SEARCH_LIMIT + SEARCH_LIMIT_PER_PROMPT * count)
    outside = (prompt for prompt in read if split_of(prompt.text) == split and owner_of(prompt) is None)
    return list(islice(outside, count))


def prompts_identity(source: PromptSource, seed: int, classes: ClassFile, count: int) -> dict[str, JsonValue]:
    """The part of a recipe on which the list of prompts depends."""
    return {**source_identity(source, seed), "classes": classes.sha256(), "count": count}


def owner_of_record(classes: ClassFile, class_name: str) -> ClassSpec | None:
    """The class of a record of RUN/classes/cache, from its class name alone."""
    _, mark, name = class_name.rpartition(CLASS_MARK)
    named = [spec for spec in classes.classes if mark and (spec.tags or spec.images) and spec.name == name]
    return named[0] if named else classes.owner(class_name)


def picture_quotas(classes: ClassFile, total: int) -> dict[str, int]:
    """Pictures of each class from prompts, `total` in all, in the file's order; raises `Refused` if impossible.

    A class with `pictures` gets exactly these, one of photographs alone gets 0. The others share the rest by weight,
    w_c / sum w over these: whole pictures first, then one each by largest remainder, the earlier class at a tie.
    """
    fixed = {spec.name: spec.pictures for spec in classes.classes if spec.pictures is not None}
    sharing = [spec for spec in classes.classes if spec.has_prompts and spec.pictures is None]
    if not fixed and not sharing:
        return {spec.name: 0 for spec in classes.classes}
    used = sum(fixed.values())
    left = total - used
    if left < 0 or (left > 0 and not sharing):
        listed = ", ".join(f"{name} {pictures}" for name, pictures in fixed.items())
        raise Refused(
            f"classes ask for {used} pictures ({listed}), count is {total} - "
            f"set count to {used}, or change their `pictures`"
        )
    exact = _proportional(classes, sharing, left)
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: left - sum(shares.values())]:
        shares[name] += 1
    if empty := [name for name, share in shares.items() if share == 0]:
        raise Refused(
            f"class {empty[0]!r} gets none of {total} pictures (its share is {float(exact[empty[0]]):.2f}) - "
            "ask for more pictures or raise its priority"
        )
    return {spec.name: (fixed | shares).get(spec.name, 0) for spec in classes.classes}


def expected_samples(classes: ClassFile, samples: int) -> dict[str, Fraction]:
    """The exact mean number of samples of each class in n class samples: n w_c / sum w.

    Sampling is with replacement (`WeightedOrder`), so a count's standard deviation is sqrt(n p (1 - p)).
    """
    return _proportional(classes, classes.classes, samples)


def _proportional(classes: ClassFile, specs: Sequence[ClassSpec], total: int) -> dict[str, Fraction]:
    weights = {spec.name: Fraction(classes.relative_weight(spec)) for spec in specs}
    return {name: total * weight / sum(weights.values()) for name, weight in weights.items()}


def sampling_weights(classes: ClassFile, records: Counter[str]) -> dict[str, float]:
    """The sampling share of each class name: its class's share, spread evenly over the class's records.

    `records` counts the records of each class name; raises `Refused` naming a class that has none.
    """
    owners = {name: owner_of_record(classes, name) for name in records}
    in_class = Counter[str]()
    for name, spec in owners.items():
        in_class[spec.name if spec else ""] += records[name]
    for spec in classes.classes:
        if not in_class[spec.name]:
            raise Refused(f"class {spec.name!r}: no record among {records.total()} fits {spec.rule} - generate some")
    return {
        name: classes.sampling_share(spec) * records[name] / in_class[spec.name] if spec else 0.0
        for name, spec in owners.items()
    }


def prior_sampling_weights(classes: ClassFile, class_names: Callable[[], Sequence[str]]) -> dict[str, float] | None:
    """The share of each class name of the distillation cache in the prior rows; None where all records weigh the same.

    A class with a `prior_class` gives its share p_c to the records that match it; the shares of the others go to all
    records. `class_names` lists the class of each record; it is not called where no class has a prior. Raises `Refused`
    naming a class whose prior matches none.
    """
    if all(spec.prior_class is None for spec in classes.classes):
        return None
    records = Counter(class_names())
    weights = dict.fromkeys(records, 0.0)
    for spec in classes.classes:
        matching = [name for name in records if spec.prior_class is None or fnmatchcase(name, spec.prior_class)]
        if not matching:
            raise Refused(
                f"class {spec.name!r}: prior_class {spec.prior_class} fits no record of the cache - "
                f"{did_you_mean(spec.prior_class or '', list(records)[:20])}"
            )
        total = sum(records[name] for name in matching)
        for name in matching:
            weights[name] += classes.sampling_share(spec) * records[name] / total
    return weights


def _owner_lookup(classes: ClassFile) -> Callable[[Prompt], ClassSpec | None]:
    """The class of a prompt, cached for all prompts that the classes cannot distinguish."""
    tags = sorted({tag for spec in classes.classes for tag in spec.tags or {}})
    owners: dict[tuple[str | None, ...], ClassSpec | None] = {}

    def owner_of(prompt: Prompt) -> ClassSpec | None:
        choices = dict(prompt.derivation)
        key = (prompt.class_name, *map(choices.get, tags))
        if key not in owners:
            owners[key] = classes.owner(prompt.class_name, choices)
        return owners[key]

    return owner_of


def _shortage_reason(spec: ClassSpec, prompts: Sequence[Prompt], name_counts: Counter[str], classes: ClassFile) -> str:
    """Why a class has too few prompts."""
    if prompts:
        return "ask for fewer pictures of it, or name a source with more of its prompts"
    if spec.tags:
        return f"nothing there fits {spec.rule}, or a more specific class owns it: see `sollune prompts show N --tree`"
    matching = [name for name in name_counts if spec.claims(name)]
    if not matching:
        frequent = [name for name, _ in name_counts.most_common(8)]
        return f"{spec.pattern} fits none of the class names there: {did_you_mean(spec.pattern or '', frequent)}"
    owners = sorted({owner.name for name in matching if (owner := classes.owner(name))})
    return f"{', '.join(map(repr, owners))} is more specific and owns all that fits {spec.pattern}"
