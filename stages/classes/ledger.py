"""pictures.json: of every picture of the classes where it comes from, what it teaches, and whether it is used."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, TypeAdapter, ValidationError

from stages.system.atomic import atomic_write
from stages.system.refusal import Refused
from stages.system.text import parse_json, read_clean_text

LEDGER_FILE = "pictures.json"

PictureSource = Literal["painted", "reused", "photograph"]
LearningTarget = Literal["teacher", "data"]


@dataclass(frozen=True)
class Picture:
    """One picture of a class; its key is that of its record."""

    class_name: str
    """the class's name in the class file"""
    source: PictureSource
    target: LearningTarget
    """teacher: its stored velocities are learnt; data: its own, eps - x0, under fresh noise"""
    kept: bool
    reason: str
    """why it is set aside; empty for what is kept"""


@dataclass(frozen=True)
class Ledger:
    """All pictures of RUN/classes/cache by key, and what they were judged by."""

    judged_by: Mapping[str, JsonValue]
    pictures: Mapping[str, Picture]

    def usable_keys(self, target: LearningTarget | None = None, source: PictureSource | None = None) -> list[str]:
        """The keys that training may use, of one target and source or of all."""
        return [
            key
            for key, one in self.pictures.items()
            if one.kept and target in (None, one.target) and source in (None, one.source)
        ]

    def rejected_pictures(self) -> dict[str, Picture]:
        """The pictures that it may not use."""
        return {key: one for key, one in self.pictures.items() if not one.kept}

    def sha256(self) -> str:
        """The fingerprint of all it says."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        atomic_write(folder / LEDGER_FILE, self._text())

    def _text(self) -> str:
        lines = [f"{json.dumps(key)}: {json.dumps(_to_json(one))}" for key, one in self.pictures.items()]
        listed = ",\n  ".join(lines)
        return f'{{\n "judged_by": {json.dumps(self.judged_by)},\n "pictures": {{\n  {listed}\n }}\n}}\n'

    @classmethod
    def open(cls, folder: Path) -> "Ledger":
        """The ledger of RUN/classes; raises `Refused` when it is missing or broken."""
        path = folder / LEDGER_FILE
        try:
            said = parse_json(read_clean_text(path, str(path), "start finetune-classes again, it writes it"))
            pictures = {
                key: TypeAdapter(Picture).validate_python(_from_json(one)) for key, one in said["pictures"].items()
            }
            return cls(said["judged_by"], pictures)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise Refused(f"{path}: cannot be read ({reason}) - start finetune-classes again, it writes it") from error


def _to_json(picture: Picture) -> dict[str, Any]:
    return {("class" if name == "class_name" else name): value for name, value in vars(picture).items()}


def _from_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {("class_name" if name == "class" else name): value for name, value in entry.items()}
