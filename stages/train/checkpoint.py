"""Checkpoints: a folder each, named by the samples seen, whole or not there; a run goes on from the newest whole one.

checkpoints/000012800/  student.safetensors  ema.safetensors  optimizer.pt  memory.pt  state.json
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from safetensors import SafetensorError

from stages.system.atomic import fsync_folder
from stages.system.disk import refuse_unwritable, system_error, unwritable_error
from stages.system.ending import is_out_of_memory
from stages.system.refusal import Refused, in_one_line
from stages.train.checkpoint_store import (
    BrokenCheckpoint,
    CheckpointMeta,
    CheckpointStore,
    KeepConfig,
    fault_of,
    identity_differences,
    samples_of,
    sha256,
)

__all__ = ["CheckpointFetcher", "Checkpoints", "KeepConfig", "Resume", "fault_of"]

DISK_MARGIN_BYTES = 1 << 20
FETCH_FOLDER = ".elsewhere.partial"
"""Where a checkpoint lies while it is brought from elsewhere."""

Resume = Literal["auto", "never"]
CheckpointFetcher: TypeAlias = Callable[[Path], Path | None]
"""Brings the newest checkpoint that is kept elsewhere into an empty folder, verified; None when there is none."""


class Saveable(Protocol):
    """What can be written as a checkpoint."""

    @property
    def samples(self) -> int:
        """Samples seen."""

    def write(self, folder: Path) -> None:
        """Write all but the number of samples into a folder."""

    def size_bytes(self) -> int:
        """About what `write` needs."""


class Restorable(Protocol):
    """What can be brought back to a checkpoint."""

    def read(self, folder: Path, samples: int) -> None:
        """Take over what a folder holds, as the state after so many samples."""


class Checkpoints:
    """The checkpoints of one run.

    `identity` is what the weights depend on besides the number of samples (recipe, configuration), as JSON values;
    a run with another identity is refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: KeepConfig) -> None:
        self.folder, self.keep = folder, keep
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.store = CheckpointStore(folder)

    def save(self, state: Saveable, score: float | None = None) -> Path:
        """Write a checkpoint, read it back, give it its name, and only then delete those that need not stay.

        `score` is the validation error at this moment, if one was measured; the checkpoint with the lowest one stays.
        Raises `Refused` when the disk has no room or gives back something else; nothing else has changed then.
        """
        self.refuse_small_disk(state.size_bytes())
        final, partial = self.store.path_of(state.samples), self.store.partial_path_of(state.samples)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self._write(partial, state, score)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if found := system_error(error):
                raise Refused(f"{unwritable_error(final, found)}; start again: it goes on") from error
            if is_out_of_memory(error):
                raise
            raise Refused(f"{final}: cannot be written ({in_one_line(error)}) - start again: it goes on") from error
        if not self.store.is_intact(partial):
            fault = fault_of(partial)
            shutil.rmtree(partial)
            raise Refused(f"{final}: not read back as it was written ({fault}) - check the disk")
        self.store.publish(partial)
        self.store.rotate(final, self.keep)
        return final

    def refuse_small_disk(self, checkpoint_bytes: int) -> None:
        """Raise `Refused` when one more checkpoint does not fit, or its folder cannot be written."""
        refuse_unwritable(self.store.path_of(0))
        needed = checkpoint_bytes + DISK_MARGIN_BYTES
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise Refused(
                f"{self.folder}: {free / 2**20:.1f} MiB free, a checkpoint takes {needed / 2**20:.1f} MiB - "
                "free some space or choose another run folder, then start again: it goes on"
            )

    def refuse_other_runs(self, resume: Resume, unknown_keys: Collection[str] = ()) -> None:
        """Raise `Refused` where `restore` would find a run that may not go on; nothing changes, and little is read.

        `unsettled` names what of the identity is not known yet.
        """
        for folder in reversed([*self.store.list_all(), *self.store.list_unpublished()]):
            self._refuse_existing_run(resume)
            with suppress(BrokenCheckpoint):
                self._refuse_other_identity(folder, CheckpointMeta.read(folder), unknown_keys)
                return

    def restore(
        self, state: Restorable, resume: Resume = "auto", fetcher: CheckpointFetcher | None = None
    ) -> Path | None:
        """Bring `state` to the newest whole checkpoint; None when there is none: the run starts at its beginning.

        Says which it took, and which it passed over and why.
        """
        self.refuse_other_runs(resume)
        self.store.recover()
        found = self._find_newest(fetcher if resume == "auto" else None)
        if found is not None:
            state.read(found, samples_of(found))
        return found

    def _find_newest(self, fetcher: CheckpointFetcher | None) -> Path | None:
        """The newest whole checkpoint here, else the one that `elsewhere` brings; others stay as they are."""
        for folder in reversed(self.store.list_all()):
            if self._accept(folder):
                return folder
        if fetcher and (brought := self._fetch(fetcher)):
            return brought
        if self.store.list_all():
            print(f"{self.folder}: no checkpoint is whole, so the run starts at its beginning")
        return None

    def fetch(self, fetcher: CheckpointFetcher, resume: Resume = "auto") -> None:
        """Have the newest checkpoint brought that is kept elsewhere, where none is whole here.

        Raises `Refused` when it belongs to another run; nothing has changed then.
        """
        if resume == "auto" and all(fault_of(folder) for folder in reversed(self.store.list_all())):
            self._fetch(fetcher)

    def _fetch(self, fetcher: CheckpointFetcher) -> Path | None:
        """What `elsewhere` brings gets its place once it is known to be of this run."""
        missing = [path for path in (self.folder, *self.folder.absolute().parents) if not path.exists()]
        scratch = self.folder / FETCH_FOLDER
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            brought = fetcher(scratch)
            return self.store.publish(brought) if brought is not None and self._accept(brought) else None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            for path in missing:
                with suppress(OSError):  # it holds something by now
                    path.rmdir()

    def _accept(self, folder: Path) -> bool:
        """Whether a checkpoint is whole, saying so; raises `Refused` when it belongs to another run."""
        if fault := fault_of(folder):
            print(f"{folder}: passed over, {fault}")
            return False
        self._refuse_other_identity(folder, CheckpointMeta.read(folder))
        print(f"{folder}: taken, it is whole")
        return True

    def _refuse_existing_run(self, resume: Resume) -> None:
        if resume == "never":
            raise Refused(f"{self.folder}: holds a run already - choose another run folder, or resume it")

    def _refuse_other_identity(self, folder: Path, meta: CheckpointMeta, unknown_keys: Collection[str] = ()) -> None:
        then, now = (
            {key: value for key, value in one.items() if key not in unknown_keys}
            for one in (meta.identity, self.identity)
        )
        if changed := identity_differences(then, now):
            raise Refused(
                f"{folder}: belongs to another run ({'; '.join(changed)}) - "
                "choose another run folder, or give back what it had"
            )

    def _write(self, folder: Path, state: Saveable, score: float | None) -> None:
        state.write(folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        measured = score if score is not None and math.isfinite(score) else None
        CheckpointMeta(state.samples, measured, self.identity, files).write(folder)
        for path in folder.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
                if hasattr(os, "posix_fadvise"):  # so that the disk is read back, and not the memory before it
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        fsync_folder(folder)
