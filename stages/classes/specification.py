"""The class file: which prompts belong to a class, its weight, and which of several matching classes owns a prompt."""

import hashlib
import re
from collections.abc import Mapping
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
    """Compared from the first field on: a greater one is more specific, equal ones are a tie.

    `star/red` > `star/*` > `*/*` > `*`, and `animal/*fox` > `animal/*`; but `star/*` ties with `*/red`: the length of a
    word decides nothing as long as it stands alone between the slashes.
    """

    literal_parts: int = 0
    """parts (between slashes) and tags without a wildcard"""
    parts: int = 0
    """parts and tags in all"""
    literal_letters: int = 0
    """literal letters within the parts that have a wildcard"""
    letter_sets: int = 0
    question_marks: int = 0
    minus_stars: int = 0


def specificity(*globs: str) -> Specificity:
    """The specificity of a prompt's match with all of these globs."""
    parts = [_part_specificity(part) for glob in globs for part in _token_kinds(glob).split("/")]
    return Specificity(*map(sum, zip(*parts, strict=True)))


def _token_kinds(glob: str) -> str:
    """One letter for each token: `/`, `?` and `*` as they are, `[` for a set, `a` for a letter, escaped or not."""
    return "".join(
        token if token in "/?*" else "[" if len(token) > 1 and not ESCAPED_LETTER.fullmatch(token) else "a"
        for token in TOKEN.findall(glob)
    )


def _part_specificity(kinds: str) -> Specificity:
    if not kinds.strip("a"):
        return Specificity(literal_parts=1, parts=1)
    return Specificity(0, 1, kinds.count("a"), kinds.count("["), kinds.count("?"), -kinds.count("*"))


Priority = Literal["top", "mid", "low"]
NO_CHOICES: Mapping[str, str] = {}


class ClassSpec(Strict):
    """One class: the prompts that match its pattern and its tags, and their weight."""

    name: NonEmpty = Field(min_length=1, description="name shown in tables")
    pattern: str | None = Field(None, min_length=1, description="glob over class names, such as star/* or */red")
    priority: Priority = Field(description="top, mid or low")
    tags: Mapping[str, str] | None = Field(
        None, min_length=1, description="choice -> glob over the grammar's choices (`sollune prompts show N --tree`)"
    )
    weight: float | None = Field(None, gt=0, description="weight of its own; none is its priority's")
    prior_class: str | None = Field(
        None, min_length=1, description="glob over class names: cached records that preserve this kind of picture"
    )
    pictures: int | None = Field(None, ge=1, description="number of pictures; none is its share of the rest")
    images: Path | None = Field(None, description="folder of photographs; the caption of NAME.png is NAME.txt")
    caption: NonEmpty | None = Field(None, min_length=1, description="caption of photographs without a file of it")

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
        """Whether prompts can belong to it; else it has only photographs."""
        return self.pattern is not None or self.tags is not None

    def claims(self, class_name: str, choices: Mapping[str, str] = NO_CHOICES) -> bool:
        """Whether a prompt with this class name and these choices of the grammar matches."""
        if not self.has_prompts or (self.pattern is not None and not fnmatchcase(class_name, self.pattern)):
            return False
        tags = (self.tags or {}).items()
        return all(choice in choices and fnmatchcase(choices[choice], glob) for choice, glob in tags)

    @property
    def specificity(self) -> Specificity:
        """Of pattern and tags together."""
        return specificity(*filter(None, [self.pattern]), *(self.tags or {}).values())

    @property
    def rule(self) -> str:
        """Pattern and tags in one line, or the folder of a class of photographs alone."""
        if not self.has_prompts:
            return f"images in {self.images}"
        return " ".join([*filter(None, [self.pattern]), *(f"{tag}={glob}" for tag, glob in (self.tags or {}).items())])


class ClassFile(Strict):
    """The classes of one finetuning, and the weight of each priority."""

    weights: dict[Priority, float] = Field(
        {"top": 4.0, "mid": 2.0, "low": 1.0}, description="relative sampling share of a class of each priority"
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
        """The share of this class in all class samples: p_c = w_c / sum w."""
        return self.relative_weight(spec) / sum(self.relative_weight(other) for other in self.classes)

    def owner(self, class_name: str, choices: Mapping[str, str] = NO_CHOICES) -> ClassSpec | None:
        """The most specific class that claims a prompt, if any; raises `Refused` for a tie."""
        claiming = [spec for spec in self.classes if spec.claims(class_name, choices)]
        if not claiming:
            return None
        most = max(spec.specificity for spec in claiming)
        first, *others = [spec for spec in claiming if spec.specificity == most]
        if others:
            raise Refused(
                f"classes {first.name!r} ({first.rule}) and {others[0].name!r} ({others[0].rule}) both claim "
                f"{class_name!r}, and neither is more specific - make one of them narrower"
            )
        return first

    def sha256(self) -> str:
        """The fingerprint of the file's content, without absent keys and without the folders of photographs."""
        content = self.model_dump_json(exclude_none=True, exclude={"classes": {"__all__": {"images"}}})
        return hashlib.sha256(content.encode()).hexdigest()


def load_classes(path: Path) -> ClassFile:
    """Read a class file; raises `Refused` with its name and its first error."""
    content = read_yaml(path, f"classes: {path}", "name a YAML file with a list of classes")
    try:
        return ClassFile.model_validate(content)
    except ValidationError as error:
        location, reason = first_error(error, ClassFile, content)
        raise Refused(f"classes: {path}: {': '.join([*_describe_location(location, content), reason])}") from error


def _describe_location(location: tuple[str | int, ...], content: Any) -> list[str]:
    """Where an error is; a class by its name where it has one."""
    match location:
        case ("classes", int(number), *inner):
            entry = content["classes"][number]
            name = entry.get("name") if isinstance(entry, Mapping) else None
            head = f"class {name!r}" if isinstance(name, str) and name else f"class number {number + 1}"
            return [head, ".".join(map(str, inner))] if inner else [head]
    return [".".join(map(str, location))] if location else []
