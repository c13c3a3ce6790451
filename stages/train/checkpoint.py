"""Saving a run's checkpoints and resuming from the newest whole one; each is a folder named by the samples seen.

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

from stages.david.fusion import translate_stored
from stages.system.atomic import fsync_folder
from stages.system.disk import file_sha256, free_bytes, refuse_unwritable, system_error, unwritable_error
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
)

DISK_MARGIN_BYTES = 1 << 20
FETCH_FOLDER = ".elsewhere.partial"
"""Temporary place of a checkpoint that is downloaded."""

Resume = Literal["auto", "never"]
CheckpointFetcher: TypeAlias = Callable[[Path], Path | None]
"""Downloads the newest remote checkpoint into an empty folder, verified; None when there is none."""


class Saveable(Protocol):
    """A state that `Checkpoints.save` writes."""

    @property
    def samples(self) -> int:
        """Samples seen."""

    def write(self, folder: Path) -> None:
        """Write all but the number of samples into a folder."""

    def size_bytes(self) -> int:
        """About what `write` needs on the disk."""


class Restorable(Protocol):
    """A state that `Checkpoints.restore` reads."""

    def read(self, folder: Path, samples: int) -> None:
        """Load what `write` left in a folder, as the state after so many samples."""


class Checkpoints:
    """The checkpoints of one run.

    `identity` is what the weights depend on besides the number of samples (recipe, configuration), as JSON values;
    a checkpoint with another identity is refused.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: KeepConfig, section: str = "train") -> None:
        """`section` is where the command has the settings that the identity calls `train`."""
        self.folder, self.keep, self._section = folder, keep, section
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.store = CheckpointStore(folder)

    def save(self, state: Saveable, score: float | None = None) -> Path:
        """Write a checkpoint, read it back, rename it to its final name, and only then delete those not kept.

        `score` is the present validation error, if measured; the checkpoint with the lowest one is kept.
        Raises `Refused` when the disk is full or does not return what was written; nothing else has changed then.
        """
        self.refuse_small_disk(state.size_bytes())
        final, partial = self.store.path_of(state.samples), self.store.partial_path_of(state.samples)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self._write(partial, state, score)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if cause := system_error(error):
                raise Refused(f"{unwritable_error(final, cause)}; start again: it goes on") from error
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
        free = free_bytes(self.folder)
        if free < needed:
            raise Refused(
                f"{self.folder}: {free / 2**20:.1f} MiB free, a checkpoint takes {needed / 2**20:.1f} MiB - "
                "free some space or choose another run folder, then start again: it goes on"
            )

    def refuse_other_runs(self, resume: Resume, unknown_keys: Collection[str] = ()) -> None:
        """Raise `Refused` where `restore` would meet another run's checkpoint; nothing changes, and little is read.

        `unknown_keys` names the keys of the identity that are not known yet.
        """
        folders = [*self.store.list_all(), *self.store.list_unpublished()]
        if folders and resume == "never":
            raise Refused(f"{self.folder}: holds a run already - choose another run folder, or resume it")
        for folder in reversed(folders):
            with suppress(BrokenCheckpoint):
                self._refuse_other_identity(folder, CheckpointMeta.read(folder), unknown_keys)
                return

    def restore(
        self, state: Restorable, resume: Resume = "auto", fetcher: CheckpointFetcher | None = None
    ) -> Path | None:
        """Load the newest whole checkpoint into `state`; None when there is none: the run starts at its beginning.

        Prints which was taken, and which were passed over and why.
        """
        self.refuse_other_runs(resume)
        self.store.recover()
        newest = next(filter(self._accept, reversed(self.store.list_all())), None)
        if newest is None and fetcher is not None and resume == "auto":
            newest = self._fetch(fetcher)
        if newest is not None:
            state.read(newest, samples_of(newest))
        elif self.store.list_all():
            print(f"{self.folder}: no checkpoint is whole, so the run starts at its beginning")
        return newest

    def fetch(self, fetcher: CheckpointFetcher, resume: Resume = "auto") -> None:
        """Download the newest remote checkpoint, where none is whole here.

        Raises `Refused` when it belongs to another run; nothing has changed then.
        """
        if resume == "auto" and all(fault_of(folder) for folder in reversed(self.store.list_all())):
            self._fetch(fetcher)

    def _fetch(self, fetcher: CheckpointFetcher) -> Path | None:
        """Download a checkpoint, and give it its place once it is known to be of this run."""
        missing = [path for path in (self.folder, *self.folder.absolute().parents) if not path.exists()]
        scratch = self.folder / FETCH_FOLDER
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            fetched = fetcher(scratch)
            return self.store.publish(fetched) if fetched is not None and self._accept(fetched) else None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            for path in missing:
                with suppress(OSError):  # not empty any more
                    path.rmdir()

    def _accept(self, folder: Path) -> bool:
        """Whether a checkpoint is whole, with a line printed; raises `Refused` when it belongs to another run."""
        if fault := fault_of(folder):
            print(f"{folder}: passed over, {fault}")
            return False
        self._refuse_other_identity(folder, CheckpointMeta.read(folder))
        print(f"{folder}: taken, it is whole")
        return True

    def _refuse_other_identity(self, folder: Path, meta: CheckpointMeta, unknown_keys: Collection[str] = ()) -> None:
        then, now = (
            {
                self._section if key == "train" else key: value
                for key, value in identity.items()
                if key not in unknown_keys
            }
            for identity in (translate_stored(meta.identity), self.identity)
        )
        if changed := identity_differences(then, now):
            raise Refused(
                f"{folder}: belongs to another run ({'; '.join(changed)}) - "
                "choose another run folder, or give back what it had"
            )

    def _write(self, folder: Path, state: Saveable, score: float | None) -> None:
        state.write(folder)
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        measured = score if score is not None and math.isfinite(score) else None
        CheckpointMeta(state.samples, measured, self.identity, files).write(folder)
        for path in folder.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
                if hasattr(os, "posix_fadvise"):  # so that the disk is read back, and not its cache
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        fsync_folder(folder)
