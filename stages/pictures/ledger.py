"""pictures.json: of every picture of the classes where it comes from, what it teaches, and whether it is used."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, TypeAdapter, ValidationError

from configs.atomic import atomic_write
from configs.json_text import parse_json
from configs.refusal import Refused
from configs.text import read_clean_text

NAME = "pictures.json"

Source = Literal["painted", "reused", "photograph"]
Target = Literal["teacher", "data"]


@dataclass(frozen=True)
class Picture:
    """One picture of a class; its key is that of its record."""

    class_name: str
    """the class's name in the class file"""
    source: Source
    target: Target
    """teacher: its stored velocities are learnt; data: its own, eps - x0, under fresh noise"""
    kept: bool
    reason: str
    """why it is set aside; empty for what is kept"""


@dataclass(frozen=True)
class Ledger:
    """All pictures of RUN/classes/cache by key, and what they were judged by."""

    judged_by: Mapping[str, JsonValue]
    pictures: Mapping[str, Picture]

    def kept(self, target: Target | None = None, source: Source | None = None) -> list[str]:
        """The keys that training may use, of one target and source or of all."""
        return [
            key
            for key, one in self.pictures.items()
            if one.kept and target in (None, one.target) and source in (None, one.source)
        ]

    def set_aside(self) -> dict[str, Picture]:
        """The pictures that it may not use."""
        return {key: one for key, one in self.pictures.items() if not one.kept}

    def sha256(self) -> str:
        """The fingerprint of all it says."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        atomic_write(folder / NAME, self._text())

    def _text(self) -> str:
        lines = [f"{json.dumps(key)}: {json.dumps(_said(one))}" for key, one in self.pictures.items()]
        listed = ",\n  ".join(lines)
        return f'{{\n "judged_by": {json.dumps(self.judged_by)},\n "pictures": {{\n  {listed}\n }}\n}}\n'

    @classmethod
    def open(cls, folder: Path) -> "Ledger":
        """The ledger of RUN/classes; raises `Refused` when it is missing or broken."""
        path = folder / NAME
        try:
            said = parse_json(read_clean_text(path, str(path), "start finetune-classes again, it writes it"))
            pictures = {key: TypeAdapter(Picture).validate_python(_heard(one)) for key, one in said["pictures"].items()}
            return cls(said["judged_by"], pictures)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise Refused(f"{path}: cannot be read ({reason}) - start finetune-classes again, it writes it") from error


def _said(picture: Picture) -> dict[str, Any]:
    return {("class" if name == "class_name" else name): value for name, value in vars(picture).items()}


def _heard(said: Mapping[str, Any]) -> dict[str, Any]:
    return {("class_name" if name == "class" else name): value for name, value in said.items()}
