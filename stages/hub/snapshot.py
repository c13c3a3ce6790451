"""Snapshots of folders for the upload, each for one commit, and the queue of those that wait for it.

A snapshot stays whole while the folder itself is pruned or replaced.
"""

import os
import shutil
import threading
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from stages.system.atomic import is_abandoned, temporary_path
from stages.train.checkpoint_store import fault_of

CHECKPOINTS_FOLDER = "checkpoints"
DIFFUSERS_FOLDER = "diffusers"


@dataclass(frozen=True)
class Snapshot:
    """A copy of a checkpoint or an export, by hard links where the disk knows them."""

    name: str
    """`checkpoints/000012800` or `export`."""
    folder: Path
    samples: int | None
    """Samples seen when the checkpoint was written; None for an export."""

    @property
    def kind(self) -> str:
        """`checkpoint`, of which a newer one supersedes an older one, or `export`."""
        return "export" if self.samples is None else "checkpoint"

    def files(self) -> dict[str, Path]:
        """Path in the repository -> file; an export lies at the root, its diffusers folder unfolded there."""
        files = {path.relative_to(self.folder).as_posix(): path for path in plain_files(self.folder)}
        if self.samples is not None:
            return {f"{self.name}/{name}": path for name, path in files.items()}
        inner = f"{DIFFUSERS_FOLDER}/"
        unfolded = {name.removeprefix(inner): path for name, path in files.items() if name.startswith(inner)}
        return {**unfolded, **{name: path for name, path in files.items() if not name.startswith(inner)}}

    def fault(self) -> str | None:
        """Why it must not be uploaded; None when there is no reason."""
        if self.samples is not None:
            return fault_of(self.folder)
        return None if plain_files(self.folder) else "the export is empty"

    def delete(self) -> None:
        """Remove the snapshot."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


class Staging:
    """The folder for snapshots in one run folder: on the same disk, so that hard links are possible."""

    def __init__(self, run: Path) -> None:
        self.folder = temporary_path(run / "hub")
        self._numbers = count()
        for left in run.glob(".hub.*.partial"):
            if is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)

    def snapshot_checkpoint(self, source: Path) -> Snapshot:
        """The snapshot of a checkpoint; raises OSError when none can be made."""
        return Snapshot(f"{CHECKPOINTS_FOLDER}/{source.name}", self._link_files(source), int(source.name))

    def snapshot_export(self, source: Path) -> Snapshot:
        """The snapshot of an export; raises OSError when none can be made."""
        return Snapshot("export", self._link_files(source), None)

    def close(self) -> None:
        """Remove all snapshots."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _link_files(self, source: Path) -> Path:
        own = self.folder / str(next(self._numbers))
        try:
            for path in plain_files(source):
                link_or_copy(path, own / source.name / path.relative_to(source))
        except OSError:
            shutil.rmtree(own, ignore_errors=True)
            raise
        return own / source.name


class UploadQueue:
    """Snapshots in order of arrival; a checkpoint replaces a waiting older one, so that a slow link has few to send."""

    def __init__(self) -> None:
        self._pending: list[Snapshot] = []
        self._in_flight: Snapshot | None = None
        self._closing = False
        self._changed = threading.Condition()

    def add(self, snapshot: Snapshot) -> None:
        """Append a snapshot, and drop the checkpoint that it supersedes."""
        with self._changed:
            for older in [other for other in self._pending if other.kind == snapshot.kind == "checkpoint"]:
                self._pending.remove(older)
                older.delete()
            self._pending.append(snapshot)
            self._changed.notify()

    def get(self) -> Snapshot | None:
        """Wait for a snapshot; None when there is none and the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            self._in_flight = self._pending.pop(0) if self._pending else None
            return self._in_flight

    def finish(self) -> None:
        """Drop the snapshot in flight: it arrived, or never can."""
        with self._changed:
            if self._in_flight is not None:
                self._in_flight.delete()
            self._in_flight = None

    def requeue(self) -> None:
        """Put the snapshot in flight behind the others, which may succeed; dropped when superseded meanwhile."""
        with self._changed:
            snapshot, self._in_flight = self._in_flight, None
            if snapshot is None:
                return
            if any(other.kind == snapshot.kind == "checkpoint" for other in self._pending):
                snapshot.delete()
            else:
                self._pending.append(snapshot)

    def close(self) -> None:
        """Let `get` return None once the queue is empty."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def abandon(self) -> list[str]:
        """Close and empty the queue; returns the names of all that did not arrive.

        The upload in flight fails by itself once its snapshot is deleted.
        """
        with self._changed:
            left = self.pending_names()
            self._pending, self._closing = [], True
            self._changed.notify()
            return left

    def pending_names(self) -> list[str]:
        """Names of the snapshots that did not arrive yet, the one in flight first."""
        with self._changed:
            return [snapshot.name for snapshot in ([self._in_flight] if self._in_flight else []) + self._pending]


def plain_files(folder: Path) -> list[Path]:
    """Every file below a folder by name, without partial ones (`.name.partial`)."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file's content; a copy where the disk knows no hard links or the target lies on another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # EXDEV, EPERM, ENOTSUP, EMLINK: systems differ
        shutil.copyfile(source, target)
