"""How much a glob over class names says, so that of two that fit, the one that says more can win.

The class file: what belongs to a class, how much it matters, and who owns a prompt that several classes claim.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from configs.load import first_error
from configs.values import NonEmpty, Strict
from configs.yaml_text import read_yaml
from stages.system.refusal import Refused

TOKEN = re.compile(r"\[!?\]?[^]]*\]|.", re.DOTALL)
"""`*`, `?`, a set such as `[a-c]`, or one letter, as `fnmatch` reads them (its `*` passes over `/` too)."""
ESCAPED_LETTER = re.compile(r"\[[^!]\]")
"""A set of one letter: the letter itself."""


class Specificity(NamedTuple):
    """How much is said, compared from the first field on: a greater one is more specific, equal ones are a tie.

    `star/red` > `star/*` > `*/*` > `*`, and `animal/*fox` > `animal/*`; but `star/*` ties with `*/red`: how long a
    word is spelt decides nothing as long as it stands alone between the slashes.
    """

    literal_parts: int = 0
    """parts (between slashes) without a wildcard, and tags whose word is told"""
    parts: int = 0
    """parts and tags in all: how deep it reaches"""
    literal_letters: int = 0
    """letters told within the parts that have a wildcard"""
    letter_sets: int = 0
    question_marks: int = 0
    """question marks"""
    minus_stars: int = 0

    def combine(self, other: "Specificity") -> "Specificity":
        """What both say together."""
        return Specificity(*(a + b for a, b in zip(self, other, strict=True)))


def specificity(pattern: str) -> Specificity:
    """How much a pattern says."""
    said = Specificity()
    for part in _split_parts(pattern):
        said = said.combine(_part_specificity(part))
    return said


def _part_specificity(tokens: list[str]) -> Specificity:
    stars, places = tokens.count("*"), tokens.count("?")
    sets = sum(len(token) > 1 for token in tokens)
    if not stars + places + sets:
        return Specificity(literal_parts=1, parts=1)
    return Specificity(0, 1, len(tokens) - stars - places - sets, sets, places, -stars)


def _split_parts(pattern: str) -> Iterator[list[str]]:
    """The tokens of each part; a letter that is escaped as a set counts as that letter, even where it is a star."""
    part: list[str] = []
    for token in TOKEN.findall(pattern):
        if token == "/":
            yield part
            part = []
        else:
            part.append("a" if ESCAPED_LETTER.fullmatch(token) else token)
    yield part


Priority = Literal["top", "mid", "low"]
NO_CHOICES: Mapping[str, str] = {}


class ClassSpec(Strict):
    """One class: the prompts that fit its pattern and its tags, and how much they matter."""

    name: NonEmpty = Field(min_length=1, description="name shown in tables")
    pattern: str | None = Field(None, min_length=1, description="glob over class names, such as star/* or */red")
    priority: Priority = Field(description="top, mid or low")
    tags: Mapping[str, str] | None = Field(
        None,
        min_length=1,
        description="choice -> glob over what the grammar chose, as `sollune prompts show N --tree` prints it",
    )
    weight: float | None = Field(None, gt=0, description="weight of its own; none is its priority's")
    prior_class: str | None = Field(
        None, min_length=1, description="glob over class names: the cached records that keep its kind in place"
    )
    pictures: int | None = Field(None, ge=1, description="number of pictures; none is its share of what is left")
    images: Path | None = Field(
        None,
        description="folder of photographs of one's own, beside the painted ones; the caption of NAME.png is NAME.txt",
    )
    caption: NonEmpty | None = Field(
        None, min_length=1, description="caption of the photographs that have none beside them"
    )

    @model_validator(mode="after")
    def _check_membership(self) -> "ClassSpec":
        if not self.has_prompts and self.images is None:
            raise ValueError("no pattern and no tags - say which prompts belong to it, or name a folder of images")
        if not self.has_prompts and self.pictures is not None:
            raise ValueError("pictures without a pattern or tags - its photographs are its pictures: leave it out")
        if self.images is None and self.caption is not None:
            raise ValueError("caption without images - name their folder, or leave it out")
        return self

    @property
    def has_prompts(self) -> bool:
        """Whether prompts can belong to it; else it has nothing but photographs."""
        return self.pattern is not None or self.tags is not None

    def claims(self, class_name: str, choices: Mapping[str, str] = NO_CHOICES) -> bool:
        """Whether a prompt of this class name, whose grammar chose what is `said`, fits here."""
        if not self.has_prompts or (self.pattern is not None and not fnmatchcase(class_name, self.pattern)):
            return False
        tags = (self.tags or {}).items()
        return all(choice in choices and fnmatchcase(choices[choice], wanted) for choice, wanted in tags)

    @property
    def specificity(self) -> Specificity:
        """How much pattern and tags say together."""
        tags = [specificity(wanted) for wanted in (self.tags or {}).values()]
        said = Specificity() if self.pattern is None else specificity(self.pattern)
        for tag in tags:
            said = said.combine(tag)
        return said

    @property
    def rule(self) -> str:
        """Pattern and tags in one line, or the folder of a class that has nothing else."""
        if not self.has_prompts:
            return f"images in {self.images}"
        tags = [f"{choice}={wanted}" for choice, wanted in (self.tags or {}).items()]
        return " ".join([*([self.pattern] if self.pattern is not None else []), *tags])


class ClassFile(Strict):
    """The classes of one finetuning, and what each priority weighs."""

    weights: dict[Priority, float] = Field(
        {"top": 4.0, "mid": 2.0, "low": 1.0}, description="share of a class of each priority, relative to the others"
    )
    classes: tuple[ClassSpec, ...] = Field(min_length=1, description="the classes, in the order of every table")

    @model_validator(mode="after")
    def _check_weights(self) -> "ClassFile":
        names = [spec.name for spec in self.classes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"class {twice[0]!r} is listed twice - give each class one entry")
        for spec in self.classes:
            if spec.weight is None and not self.weights.get(spec.priority, 0) > 0:
                raise ValueError(f"priority {spec.priority!r} of class {spec.name!r} has no positive weight - give one")
        if not isfinite(sum(self.relative_weight(spec) for spec in self.classes)):
            raise ValueError("the weights of the classes have no finite sum - take smaller ones")
        return self

    def relative_weight(self, spec: ClassSpec) -> float:
        """The class's own weight, or else its priority's."""
        return self.weights[spec.priority] if spec.weight is None else spec.weight

    def sampling_share(self, spec: ClassSpec) -> float:
        """The share of all draws that this class gets: p_c = w_c / sum w. Nothing else decides it."""
        return self.relative_weight(spec) / sum(self.relative_weight(other) for other in self.classes)

    def owner(self, class_name: str, choices: Mapping[str, str] = NO_CHOICES) -> ClassSpec | None:
        """The most specific class that claims a prompt, if any; raises `Refused` when two say equally much of it."""
        claim = [spec for spec in self.classes if spec.claims(class_name, choices)]
        if not claim:
            return None
        most = max(spec.specificity for spec in claim)
        owners = [spec for spec in claim if spec.specificity == most]
        if len(owners) > 1:
            first, second = owners[:2]
            raise Refused(
                f"classes {first.name!r} ({first.rule}) and {second.name!r} ({second.rule}) both claim {class_name!r}, "
                "and neither is more specific - make one of them narrower"
            )
        return owners[0]

    def sha256(self) -> str:
        """The fingerprint of what the file says; a key that is left out does not count, nor where photographs lie."""
        said = self.model_dump_json(exclude_none=True, exclude={"classes": {"__all__": {"images"}}})
        return hashlib.sha256(said.encode()).hexdigest()


def load_classes(path: Path) -> ClassFile:
    """Read a class file; raises `Refused` with its name and the first thing that is wrong."""
    content = read_yaml(path, f"classes: {path}", "name a YAML file with a list of classes")
    try:
        return ClassFile.model_validate(content)
    except ValidationError as error:
        place, slip = first_error(error, ClassFile, content)
        raise Refused(f"classes: {path}: {': '.join([*_describe_location(place, content), slip])}") from error


def _describe_location(location: tuple[str | int, ...], content: Any) -> list[str]:
    """Where a slip lies; a class is called by its name where it has one."""
    match location:
        case ("classes", int(number), *inner):
            entry = content["classes"][number]
            name = entry.get("name") if isinstance(entry, Mapping) else None
            head = f"class {name!r}" if isinstance(name, str) and name else f"class number {number + 1}"
            return [head, ".".join(map(str, inner))] if inner else [head]
    return [".".join(map(str, location))] if location else []
