"""The class file: what belongs to a class, how much it matters, and who owns a prompt that several classes claim."""

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from configs.judgement import slip_of
from configs.refusal import Refused
from configs.strict import NonEmpty, Strict
from configs.yaml_text import read_yaml
from stages.classes.pattern import Specificity, specificity

Priority = Literal["top", "mid", "low"]
NOTHING_SAID: Mapping[str, str] = {}


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
    def _says_whose(self) -> "ClassSpec":
        if not self.is_painted and self.images is None:
            raise ValueError("no pattern and no tags - say which prompts belong to it, or name a folder of images")
        if not self.is_painted and self.pictures is not None:
            raise ValueError("pictures without a pattern or tags - its photographs are its pictures: leave it out")
        if self.images is None and self.caption is not None:
            raise ValueError("caption without images - name their folder, or leave it out")
        return self

    @property
    def is_painted(self) -> bool:
        """Whether prompts can belong to it; else it has nothing but photographs."""
        return self.pattern is not None or self.tags is not None

    def claims(self, class_name: str, said: Mapping[str, str] = NOTHING_SAID) -> bool:
        """Whether a prompt of this class name, whose grammar chose what is `said`, fits here."""
        if not self.is_painted or (self.pattern is not None and not fnmatchcase(class_name, self.pattern)):
            return False
        tags = (self.tags or {}).items()
        return all(choice in said and fnmatchcase(said[choice], wanted) for choice, wanted in tags)

    @property
    def specificity(self) -> Specificity:
        """How much pattern and tags say together."""
        tags = [specificity(wanted) for wanted in (self.tags or {}).values()]
        said = Specificity() if self.pattern is None else specificity(self.pattern)
        for tag in tags:
            said = said.joined(tag)
        return said

    @property
    def rule(self) -> str:
        """Pattern and tags in one line, or the folder of a class that has nothing else."""
        if not self.is_painted:
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
    def _sound(self) -> "ClassFile":
        names = [spec.name for spec in self.classes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"class {twice[0]!r} is listed twice - give each class one entry")
        for spec in self.classes:
            if spec.weight is None and not self.weights.get(spec.priority, 0) > 0:
                raise ValueError(f"priority {spec.priority!r} of class {spec.name!r} has no positive weight - give one")
        if not isfinite(sum(self.relative(spec) for spec in self.classes)):
            raise ValueError("the weights of the classes have no finite sum - take smaller ones")
        return self

    def relative(self, spec: ClassSpec) -> float:
        """The class's own weight, or else its priority's."""
        return self.weights[spec.priority] if spec.weight is None else spec.weight

    def weight(self, spec: ClassSpec) -> float:
        """The share of all draws that this class gets: p_c = w_c / sum w. Nothing else decides it."""
        return self.relative(spec) / sum(self.relative(other) for other in self.classes)

    def owner(self, class_name: str, said: Mapping[str, str] = NOTHING_SAID) -> ClassSpec | None:
        """The most specific class that claims a prompt, if any; raises `Refused` when two say equally much of it."""
        claim = [spec for spec in self.classes if spec.claims(class_name, said)]
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
        place, slip = slip_of(error, ClassFile, content)
        raise Refused(f"classes: {path}: {': '.join([*_called(place, content), slip])}") from error


def _called(place: tuple[str | int, ...], content: Any) -> list[str]:
    """Where a slip lies; a class is called by its name where it has one."""
    match place:
        case ("classes", int(number), *inner):
            entry = content["classes"][number]
            name = entry.get("name") if isinstance(entry, Mapping) else None
            head = f"class {name!r}" if isinstance(name, str) and name else f"class number {number + 1}"
            return [head, ".".join(map(str, inner))] if inner else [head]
    return [".".join(map(str, place))] if place else []
