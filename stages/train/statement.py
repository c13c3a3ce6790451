"""state.json: what a checkpoint says of itself, written last, under a seal, with the hashes of all its other files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.seal import sealed, unsealed

FILE = "state.json"
SCHEMA = 3


class Broken(Exception):
    """Why a folder is no whole checkpoint."""


@dataclass(frozen=True)
class Statement:
    """What a checkpoint says of itself."""

    samples: int
    score: float | None
    """Validation error when it was written, the lower the better; None when none was measured."""
    identity: Mapping[str, Any]
    """What its weights depend on besides `samples`: another run may not go on from it."""
    files: Mapping[str, str]
    """sha256 of every other file."""

    def write(self, folder: Path) -> None:
        """Write it into the folder that it speaks of."""
        body = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False).removesuffix("\n}")
        (folder / FILE).write_text(sealed(f"{body},\n"), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Statement":
        """Raises `Broken` unless it is there, of this schema, and every bit of it is as it was written."""
        try:
            content = (folder / FILE).read_bytes()
            said = json.loads(content)
            schema = said.pop("schema")
        except FileNotFoundError as error:
            raise Broken(f"{FILE} is missing, so it was never finished") from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise Broken(f"{FILE} cannot be read") from error
        if schema != SCHEMA:
            raise Broken(f"its schema is {schema}, this program reads {SCHEMA}")
        if unsealed(content):
            raise Broken(f"{FILE} is not the file that was written")
        del said["sha256"]
        try:
            return cls(**said)
        except TypeError as error:
            raise Broken(f"{FILE} lacks something or says too much ({error})") from error


def samples_of(folder: Path) -> int:
    """The samples in a checkpoint's name, whether the name is final (000000008) or hidden (.000000008.partial)."""
    return int(folder.name.lstrip(".").partition(".")[0])


def fault_of(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted; None when every file was read and is what state.json says."""
    try:
        said = Statement.read(folder)
        if said.samples != samples_of(folder):
            return f"{FILE} speaks of {said.samples} samples"
        for name, expected in said.files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != expected:
                return f"{name} is not the file that was written"
    except Broken as broken:
        return str(broken)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    return None


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Where two nested mappings differ, each as `full.path was A, is B`."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted({*then, *now})
        return [line for k in keys for line in differences(then.get(k), now.get(k), f"{path}.{k}" if path else k)]
    if then == now:
        return []
    because = ": the learning rate's cosine would change" if path.endswith("max_samples") else ""
    return [f"{path} was {then}, is {now}{because}"]


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
