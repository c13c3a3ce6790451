"""Classes to care about: which prompts belong to one, and how many pictures and how much weight its priority earns."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from configs.refusal import Refused
from configs.strict import Strict
from stages.prompts import Prompt, PromptSource, Split, split_of

Priority = Literal["top", "mid", "low"]
LOOKED_AT_PER_PROMPT = 20_000


class ClassSpec(Strict):
    """One class: the prompts whose class name fits the pattern, and how much they matter."""

    name: str = Field(min_length=1, description="name shown in tables")
    pattern: str = Field(description="glob over class names, such as star/* or */red")
    priority: Priority = Field(description="top, mid or low")

    def claims(self, class_name: str) -> bool:
        """Whether a prompt of this class name belongs here."""
        return fnmatchcase(class_name, self.pattern)


class ClassFile(Strict):
    """The classes of one finetuning, and what each priority weighs."""

    weights: dict[Priority, float] = Field(
        {"top": 4.0, "mid": 2.0, "low": 1.0}, description="share of a class of each priority, relative to the others"
    )
    classes: tuple[ClassSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sound(self) -> "ClassFile":
        names = [spec.name for spec in self.classes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"class {twice[0]!r} is listed twice - give each class one entry")
        for spec in self.classes:
            if self.weights.get(spec.priority, 0) <= 0:
                raise ValueError(f"priority {spec.priority!r} of class {spec.name!r} has no positive weight")
        return self

    def weight(self, spec: ClassSpec) -> float:
        """The share of all draws that this class gets; the shares of a file sum to one."""
        return self.weights[spec.priority] / sum(self.weights[other.priority] for other in self.classes)

    def owner(self, class_name: str) -> ClassSpec | None:
        """The class that a prompt belongs to, if any; raises `Refused` when two claim it."""
        owners = [spec for spec in self.classes if spec.claims(class_name)]
        if len(owners) > 1:
            raise Refused(
                f"classes {owners[0].name!r} and {owners[1].name!r} both claim {class_name!r} - "
                "make their patterns disjoint"
            )
        return owners[0] if owners else None

    def quotas(self, total: int) -> dict[str, int]:
        """Pictures for each class: `total` shared by weight, largest remainders first, in the file's order."""
        exact = {spec.name: total * self.weight(spec) for spec in self.classes}
        shares = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
        for name in by_remainder[: total - sum(shares.values())]:
            shares[name] += 1
        empty = [name for name, share in shares.items() if share == 0]
        if empty:
            raise Refused(
                f"class {empty[0]!r} gets none of {total} pictures - ask for more pictures or raise its priority"
            )
        return shares


def load_classes(path: Path) -> ClassFile:
    """Read a class file; raises `Refused` with its name and the first thing that is wrong."""
    if not path.is_file():
        raise Refused(f"classes: {path} does not exist - name a YAML file with a list of classes")
    try:
        return ClassFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise Refused(f"classes: {path}: {reason}") from error


def class_prompts(
    source: PromptSource, seed: int, split: Split, classes: Sequence[ClassSpec], quotas: Mapping[str, int]
) -> dict[str, list[Prompt]]:
    """The first prompts of each class, in the source's order; raises `Refused` naming a class that has too few."""
    found: dict[str, list[Prompt]] = {spec.name: [] for spec in classes}
    missing = sum(quotas.values())
    for looked_at, prompt in enumerate(source.endless(seed)):
        if missing == 0:
            break
        if looked_at > LOOKED_AT_PER_PROMPT + 200 * sum(quotas.values()):
            name = next(name for name in found if len(found[name]) < quotas[name])
            raise Refused(
                f"class {name!r}: {len(found[name])} of {quotas[name]} prompts found - "
                "does its pattern fit the class names?"
            )
        for spec in classes:
            open_place = len(found[spec.name]) < quotas[spec.name]
            if open_place and spec.claims(prompt.class_name) and split_of(prompt.text) == split:
                found[spec.name].append(prompt)
                missing -= 1
    return found
