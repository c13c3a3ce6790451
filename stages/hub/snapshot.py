"""What goes to the hub in one commit: a snapshot of a folder, which stays whole while the folder itself is pruned."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from stages.system.atomic import is_abandoned, temporary_path
from stages.train.checkpoint_store import fault_of

CHECKPOINTS_FOLDER = "checkpoints"
DIFFUSERS_FOLDER = "diffusers"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot with the names that its files will have in the repository."""

    name: str
    """`checkpoints/000012800` or `export`."""
    folder: Path
    samples: int | None
    """Samples seen when the checkpoint was written; None for an export."""

    @property
    def kind(self) -> str:
        """A newer parcel of the kind `checkpoint` makes an older one superfluous."""
        return "export" if self.samples is None else "checkpoint"

    def files(self) -> dict[str, Path]:
        """Path in the repository -> file; an export lies at the root, its diffusers folder unfolded there."""
        found = {path.relative_to(self.folder).as_posix(): path for path in plain_files(self.folder)}
        if self.samples is not None:
            return {f"{self.name}/{name}": path for name, path in found.items()}
        inner = f"{DIFFUSERS_FOLDER}/"
        unfolded = {name.removeprefix(inner): path for name, path in found.items() if name.startswith(inner)}
        return {**unfolded, **{name: path for name, path in found.items() if not name.startswith(inner)}}

    def fault(self) -> str | None:
        """Why it must not be sent; None when there is no reason."""
        if self.samples is not None:
            return fault_of(self.folder)
        return None if plain_files(self.folder) else "the export is empty"

    def delete(self) -> None:
        """Remove the snapshot."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


class Staging:
    """The room for snapshots in one run folder: on the same disk, so that a snapshot is a set of hard links."""

    def __init__(self, run: Path) -> None:
        self.folder = temporary_path(run / "hub")
        self._numbers = count()
        for forgotten in run.glob(".hub.*.partial"):
            if is_abandoned(forgotten):
                shutil.rmtree(forgotten, ignore_errors=True)

    def snapshot_checkpoint(self, source: Path) -> Snapshot:
        """A checkpoint's parcel; raises OSError when no snapshot can be made."""
        return Snapshot(f"{CHECKPOINTS_FOLDER}/{source.name}", self._link_files(source), int(source.name))

    def snapshot_export(self, source: Path) -> Snapshot:
        """An export's parcel; raises OSError when no snapshot can be made."""
        return Snapshot("export", self._link_files(source), None)

    def close(self) -> None:
        """Remove all that is left here."""
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


@contextmanager
def open_staging(run: Path) -> Iterator[Staging]:
    """A `Staging` that is gone when the block ends."""
    staging = Staging(run)
    try:
        yield staging
    finally:
        staging.close()


def plain_files(folder: Path) -> list[Path]:
    """Every file below a folder by name, without what is half-written (`.name.partial`)."""
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
    except OSError:  # EXDEV, EPERM, ENOTSUP, EMLINK: what systems say here differs
        shutil.copyfile(source, target)
