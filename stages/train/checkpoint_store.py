"""The folder of checkpoints, the metadata of each (`state.json`), and the rule which of them are kept.

A checkpoint is hidden (.000012800.partial) until all of it was read back, and again (.000012800.gone) while it is
deleted. Each renaming is atomic, so whatever has a final name was whole once, whenever a process dies.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import Field

from configs.values import Strict
from shards.files.handle import FileIdentity
from shards.integrity import append_seal, seal_fault
from stages.system.atomic import fsync_folder
from stages.system.disk import file_sha256

META_FILE = "state.json"
META_SCHEMA = 3


class BrokenCheckpoint(Exception):
    """Why a folder is no whole checkpoint."""


@dataclass(frozen=True)
class CheckpointMeta:
    """`state.json`: written last, sealed, with the hashes of all other files."""

    samples: int
    score: float | None
    """Validation error when it was written, the lower the better; None when none was measured."""
    identity: Mapping[str, Any]
    """What its weights depend on besides `samples`; only a run of the same identity resumes from it."""
    files: Mapping[str, str]
    """sha256 of every other file."""

    def write(self, folder: Path) -> None:
        """Write it into the checkpoint's folder."""
        body = json.dumps({"schema": META_SCHEMA, **asdict(self)}, indent=1, allow_nan=False).removesuffix("\n}")
        (folder / META_FILE).write_text(append_seal(f"{body},\n"), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "CheckpointMeta":
        """Raises `BrokenCheckpoint` unless it exists, has this schema, and no bit of it has changed."""
        try:
            content = (folder / META_FILE).read_bytes()
            fields = json.loads(content)
            schema = fields.pop("schema")
        except FileNotFoundError as error:
            raise BrokenCheckpoint(f"{META_FILE} is missing, so it was never finished") from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BrokenCheckpoint(f"{META_FILE} cannot be read") from error
        if schema != META_SCHEMA:
            raise BrokenCheckpoint(f"its schema is {schema}, this program reads {META_SCHEMA}")
        if seal_fault(content):
            raise BrokenCheckpoint(f"{META_FILE} is not the file that was written")
        del fields["sha256"]
        try:
            return cls(**fields)
        except TypeError as error:
            raise BrokenCheckpoint(f"{META_FILE} has missing or unknown fields ({error})") from error


def samples_of(folder: Path) -> int:
    """The samples in a checkpoint's name, whether the name is final (000000008) or hidden (.000000008.partial)."""
    return int(folder.name.lstrip(".").partition(".")[0])


def fault_of(folder: Path) -> str | None:
    """Why this checkpoint cannot be used; None when every file was read and has the hash in state.json."""
    try:
        meta = CheckpointMeta.read(folder)
        if meta.samples != samples_of(folder):
            return f"{META_FILE} is of {meta.samples} samples"
        for name, expected in meta.files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_sha256(folder / name) != expected:
                return f"{name} is not the file that was written"
    except BrokenCheckpoint as broken:
        return str(broken)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    return None


def identity_differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Where two nested mappings differ, each as `full.path was A, is B`."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted({*then, *now})
        return [
            line for k in keys for line in identity_differences(then.get(k), now.get(k), f"{path}.{k}" if path else k)
        ]
    if then == now:
        return []
    because = ": the learning rate's cosine would change" if path.endswith("max_samples") else ""
    return [f"{path} was {then}, is {now}{because}"]


class KeepConfig(Strict):
    """Which checkpoints stay; the one with the lowest validation error always does, if a run measures it."""

    last: int = Field(2, ge=1, description="newest checkpoints that stay")
    every_samples: int | None = Field(
        None, ge=1, description="the first checkpoint at or after each multiple of so many samples stays for good"
    )


def checkpoints_to_keep(scores: Mapping[int, float | None], keep: KeepConfig) -> set[int]:
    """The samples of those whole checkpoints that stay; `scores` maps the samples of each to its validation error.

    The lowest score is the best, the earlier one of two equals; None was not measured. Deciding after every save
    leaves what deciding once at the end would, because a checkpoint that is deleted would never be kept later.
    """
    ordered = sorted(scores)
    kept = set(ordered[-keep.last :])
    if keep.every_samples is not None:
        intervals = groupby(ordered, key=lambda samples: samples // keep.every_samples)  # type: ignore[operator]
        kept |= {next(members) for multiple, members in intervals if multiple > 0}
    measured = [(score, samples) for samples, score in scores.items() if score is not None]
    return kept | {samples for _score, samples in sorted(measured)[:1]}


PARTIAL_SUFFIX, DISCARDED_SUFFIX = ".partial", ".gone"


class CheckpointStore:
    """The checkpoints in a folder: listed, renamed and deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._intact_stats: dict[str, list[FileIdentity]] = {}

    def list_all(self) -> list[Path]:
        """Every checkpoint by age, whole or not."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())

    def list_unpublished(self) -> list[Path]:
        """Every checkpoint that is whole but not renamed yet, by age: `recover` does that."""
        return [partial for partial in self._list_partial() if fault_of(partial) is None]

    def path_of(self, samples: int) -> Path:
        """The final name of a checkpoint."""
        return self.folder / f"{samples:09d}"

    def partial_path_of(self, samples: int) -> Path:
        """The name of a checkpoint that is being written."""
        return self.folder / f".{samples:09d}{PARTIAL_SUFFIX}"

    def is_intact(self, folder: Path) -> bool:
        """Whether it is whole; read only once by this process, as long as no file changes."""
        stats = [FileIdentity.from_stat(path.stat()) for path in sorted(folder.iterdir())]
        if self._intact_stats.get(folder.name) != stats:
            if fault_of(folder) is not None:
                return False
            self._intact_stats[folder.name] = stats
        return True

    def publish(self, partial: Path) -> Path:
        """Rename a whole checkpoint to its final name; one that has it already is broken, or the same."""
        final = self.path_of(samples_of(partial))
        if final.exists():
            self.discard(final)
        partial.replace(final)
        fsync_folder(self.folder)
        self._intact_stats[final.name] = self._intact_stats.pop(partial.name, [])
        return final

    def discard(self, folder: Path) -> None:
        """Rename a checkpoint, so that `delete_discarded` deletes it."""
        gone = self.folder / f".{folder.name}{DISCARDED_SUFFIX}"
        shutil.rmtree(gone, ignore_errors=True)
        folder.replace(gone)
        self._intact_stats.pop(folder.name, None)

    def delete_discarded(self) -> None:
        """Delete what was discarded; what a network disk still holds is deleted the next time."""
        for gone in self.folder.glob(f".[0-9]*{DISCARDED_SUFFIX}"):
            shutil.rmtree(gone, ignore_errors=True)

    def rotate(self, newest: Path, keep: KeepConfig) -> None:
        """Delete what is not kept, now that `newest` has been read back; a broken one does not count as kept.

        Newer checkpoints (broken, or one would have been taken) and those of another schema are left alone.
        """
        scores: dict[int, float | None] = {}
        for folder in self.list_all():
            try:
                meta = CheckpointMeta.read(folder)
            except BrokenCheckpoint:
                continue
            if samples_of(folder) <= samples_of(newest):
                scores[samples_of(folder)] = meta.score
        if scores.keys() != checkpoints_to_keep(scores, keep):
            whole = {samples: score for samples, score in scores.items() if self.is_intact(self.path_of(samples))}
            for samples in sorted(scores.keys() - checkpoints_to_keep(whole, keep)):
                self.discard(self.path_of(samples))
        self.delete_discarded()

    def recover(self) -> None:
        """Finish the work of a killed process: rename what is whole, delete what is incomplete."""
        for partial in self._list_partial():
            if fault_of(partial) is None:
                print(f"{partial}: whole but for its name, which it gets")
                self.publish(partial)
            else:
                print(f"{partial}: half-written, removed")
                shutil.rmtree(partial)
        self.delete_discarded()

    def _list_partial(self) -> list[Path]:
        return sorted(self.folder.glob(f".[0-9]*{PARTIAL_SUFFIX}"))
