"""A teacher of several sources as one diffusers folder, in the user's cache: made once, whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.values import expand_home
from stages.system.atomic import PARTIAL_SUFFIX, fsync_folder, is_abandoned, temporary_path
from stages.system.disk import file_sha256, free_bytes, refuse_write_errors
from stages.system.refusal import Refused
from stages.teacher_files.folder import COMPONENT_NAMES, MODEL_INDEX
from stages.teacher_files.parts import Part, digest_of

RULES = 1
"""Goes up when the same sources make another folder."""
COMPOSED_FILE = "composed.json"
KEY_CHARACTERS = 16
MARGIN_BYTES = 1 << 26
"""Free space beyond what is written."""
HOME_HINT = "free some space, or name another folder for caches in XDG_CACHE_HOME"


@dataclass(frozen=True)
class SourceFile:
    """A file that a teacher is made of."""

    role: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Composition:
    """What a folder will hold."""

    parts: Mapping[str, Part]
    model_index: Mapping[str, Any]
    sources: Sequence[SourceFile]
    card_files: Sequence[Path] = field(default=())
    """Card and licence of the model, where they lie in its folder."""

    @property
    def digests(self) -> dict[str, str]:
        """Component -> its identity."""
        return {component: self.parts[component].digest for component in COMPONENT_NAMES}

    @property
    def key(self) -> str:
        """The name of its folder: a hash over all that decides its content."""
        cards = {file.name: file_sha256(file) for file in self.card_files}
        content = {"rules": RULES, "digests": self.digests, "index": dict(self.model_index), "cards": cards}
        return digest_of(content)[:KEY_CHARACTERS]


def teachers_home() -> Path:
    """The folder of composed teachers, in the user's cache home; everything in it may be deleted.

    Raises `Refused` for a user without a home, and for a name of several lines.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return expand_home(home).absolute() / "sollune" / "teachers"
    except RuntimeError as error:
        raise Refused("HOME: this user has no home for caches - name a folder in XDG_CACHE_HOME") from error
    except ValueError as error:
        raise Refused(f"XDG_CACHE_HOME: {str(home)!r}: {error}") from error


def compose(composition: Composition) -> tuple[Path, bool]:
    """The folder of a composition, and whether it was made just now; a damaged one is made anew.

    Raises `Refused` where it cannot be written.
    """
    folder = teachers_home() / composition.key
    if is_whole(folder):
        return folder, False
    needed = sum(part.size_bytes() for part in composition.parts.values()) + MARGIN_BYTES
    with refuse_write_errors(folder):
        if (free := free_bytes(folder)) < needed:
            raise Refused(
                f"{folder}: the composed teacher needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free - "
                f"{HOME_HINT}"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        temporary = temporary_path(folder)
        try:
            _write(composition, temporary)
            _replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_folder(folder.parent)
    return folder, True


def is_whole(folder: Path) -> bool:
    """Whether every file of a composed folder is there, as it was written."""
    try:
        files = json.loads((folder / COMPOSED_FILE).read_text(encoding="utf-8"))["files"]
        return all(_is_unchanged(folder / name, entry) for name, entry in files.items()) and bool(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_unchanged(file: Path, entry: Mapping[str, Any]) -> bool:
    """By size and time of change; where the time differs, by content."""
    state = file.stat()
    if state.st_size != entry["bytes"]:
        return False
    return bool(state.st_mtime_ns == entry["mtime_ns"] or file_sha256(file) == entry["sha256"])


def _write(composition: Composition, folder: Path) -> None:
    folder.mkdir()
    for component, part in composition.parts.items():
        part.write(folder / component)
    index = json.dumps(dict(composition.model_index), indent=2, sort_keys=True)
    (folder / MODEL_INDEX).write_text(index + "\n", encoding="utf-8")
    for file in composition.card_files:
        (folder / file.name).symlink_to(file.resolve())
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {}
    for file in files:
        state = file.stat()
        entry = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": file_sha256(file)}
        entries[str(file.relative_to(folder))] = entry
        if not file.is_symlink():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    made_from = [{"role": one.role, "path": str(one.path), "sha256": one.sha256} for one in composition.sources]
    record = {"rules": RULES, "made_from": made_from, "identity": composition.digests, "files": entries}
    (folder / COMPOSED_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _replace(temporary: Path, folder: Path) -> None:
    """Give a new folder its name; a damaged one of that name is moved aside first, another process's is kept."""
    for _ in range(2):
        try:
            temporary.rename(folder)
        except OSError:
            if is_whole(folder):
                return
            aside = temporary.with_name(f"{temporary.name.removesuffix(PARTIAL_SUFFIX)}.old{PARTIAL_SUFFIX}")
            with suppress(FileNotFoundError):
                folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            return
    temporary.rename(folder)


def _remove_abandoned(home: Path) -> None:
    """Remove what processes left that ended while they wrote."""
    for path in home.glob(f".*{PARTIAL_SUFFIX}"):
        if is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
