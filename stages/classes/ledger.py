"""pictures.json: source, learning target and gate result of every picture of the classes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from stages.system.atomic import atomic_write
from stages.system.refusal import Refused
from stages.system.text import parse_json, read_clean_text

LEDGER_FILE = "pictures.json"

PictureSource = Literal["painted", "reused", "photograph"]
LearningTarget = Literal["teacher", "data"]


@dataclass(frozen=True)
class Picture:
    """One picture of a class; its key is that of its record."""

    class_name: Annotated[str, Field(alias="class")]
    """the class's name in the class file"""
    source: PictureSource
    target: LearningTarget
    """teacher: the stored velocities of the teacher; data: eps - x0, under new noise for each sample"""
    kept: bool
    reason: str
    """why the gate rejected it; empty for what is kept"""
    size: str | None = None
    """width x height in pixels; none for the model's own size"""


PICTURE: TypeAdapter[Picture] = TypeAdapter(Picture)


@dataclass(frozen=True)
class Ledger:
    """All pictures of RUN/classes/cache by key, and the settings of the gate that judged them."""

    judged_by: Mapping[str, JsonValue]
    pictures: Mapping[str, Picture]

    def usable_keys(self, target: LearningTarget | None = None, source: PictureSource | None = None) -> list[str]:
        """The keys that training may use, of one target and source or of all."""
        return [
            key
            for key, picture in self.pictures.items()
            if picture.kept and target in (None, picture.target) and source in (None, picture.source)
        ]

    def rejected_pictures(self) -> dict[str, Picture]:
        """The pictures that training may not use."""
        return {key: picture for key, picture in self.pictures.items() if not picture.kept}

    def sha256(self) -> str:
        """The fingerprint of the file's content."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the file atomically."""
        atomic_write(folder / LEDGER_FILE, self._text())

    def _text(self) -> str:
        entries = {
            key: PICTURE.dump_python(picture, by_alias=True, exclude_none=True)
            for key, picture in self.pictures.items()
        }
        listed = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        return f'{{\n "judged_by": {json.dumps(self.judged_by)},\n "pictures": {{\n  {listed}\n }}\n}}\n'

    @classmethod
    def open(cls, folder: Path) -> "Ledger":
        """The ledger of RUN/classes; raises `Refused` when it is missing or broken."""
        path, way_out = folder / LEDGER_FILE, "start finetune-classes again, it writes it"
        try:
            content = parse_json(read_clean_text(path, str(path), way_out))
            pictures = {key: PICTURE.validate_python(entry) for key, entry in content["pictures"].items()}
            return cls(content["judged_by"], pictures)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:120]
            raise Refused(f"{path}: cannot be read ({reason}) - {way_out}") from error
