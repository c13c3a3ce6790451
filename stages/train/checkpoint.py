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

from configs.atomic import fsync_folder
from configs.disk import refuse_unwritable, system_error, unwritable
from configs.last_resort import is_for_memory
from configs.refusal import Refused, in_one_line
from stages.train.retention import KeepConfig
from stages.train.shelf import Shelf
from stages.train.statement import Broken, Statement, differences, fault_of, samples_of, sha256

__all__ = ["Checkpoints", "Elsewhere", "KeepConfig", "Resume", "fault_of"]

MARGIN_BYTES = 1 << 20
FETCHED = ".elsewhere.partial"
"""Where a checkpoint lies while it is brought from elsewhere."""

Resume = Literal["auto", "never"]
Elsewhere: TypeAlias = Callable[[Path], Path | None]
"""Brings the newest checkpoint that is kept elsewhere into an empty folder, verified; None when there is none."""


class Written(Protocol):
    """What can be written as a checkpoint."""

    @property
    def samples(self) -> int:
        """Samples seen."""

    def write(self, folder: Path) -> None:
        """Write all but the number of samples into a folder."""

    def bytes(self) -> int:
        """About what `write` needs."""


class Restored(Protocol):
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
        self.shelf = Shelf(folder)

    def save(self, state: Written, score: float | None = None) -> Path:
        """Write a checkpoint, read it back, give it its name, and only then delete those that need not stay.

        `score` is the validation error at this moment, if one was measured; the checkpoint with the lowest one stays.
        Raises `Refused` when the disk has no room or gives back something else; nothing else has changed then.
        """
        self.refuse_small_disk(state.bytes())
        final, partial = self.shelf.place(state.samples), self.shelf.hidden(state.samples)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self._write(partial, state, score)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if found := system_error(error):
                raise Refused(f"{unwritable(final, found)}; start again: it goes on") from error
            if is_for_memory(error):
                raise
            raise Refused(f"{final}: cannot be written ({in_one_line(error)}) - start again: it goes on") from error
        if not self.shelf.is_whole(partial):
            fault = fault_of(partial)
            shutil.rmtree(partial)
            raise Refused(f"{final}: not read back as it was written ({fault}) - check the disk")
        self.shelf.name(partial)
        self.shelf.rotate(final, self.keep)
        return final

    def refuse_small_disk(self, checkpoint_bytes: int) -> None:
        """Raise `Refused` when one more checkpoint does not fit, or its folder cannot be written."""
        refuse_unwritable(self.shelf.place(0))
        needed = checkpoint_bytes + MARGIN_BYTES
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise Refused(
                f"{self.folder}: {free / 2**20:.1f} MiB free, a checkpoint takes {needed / 2**20:.1f} MiB - "
                "free some space or choose another run folder, then start again: it goes on"
            )

    def refuse_others(self, resume: Resume, unsettled: Collection[str] = ()) -> None:
        """Raise `Refused` where `restore` would find a run that may not go on; nothing changes, and little is read.

        `unsettled` names what of the identity is not known yet.
        """
        for folder in reversed([*self.shelf.all(), *self.shelf.nameless()]):
            self._refuse_begun(resume)
            with suppress(Broken):
                self._refuse_another(folder, Statement.read(folder), unsettled)
                return

    def restore(self, state: Restored, resume: Resume = "auto", elsewhere: Elsewhere | None = None) -> Path | None:
        """Bring `state` to the newest whole checkpoint; None when there is none: the run starts at its beginning.

        Says which it took, and which it passed over and why.
        """
        self.refuse_others(resume)
        self.shelf.tidy()
        found = self._newest(elsewhere if resume == "auto" else None)
        if found is not None:
            state.read(found, samples_of(found))
        return found

    def _newest(self, elsewhere: Elsewhere | None) -> Path | None:
        """The newest whole checkpoint here, else the one that `elsewhere` brings; others stay as they are."""
        for folder in reversed(self.shelf.all()):
            if self._is_sound(folder):
                return folder
        if elsewhere and (brought := self._fetched(elsewhere)):
            return brought
        if self.shelf.all():
            print(f"{self.folder}: no checkpoint is whole, so the run starts at its beginning")
        return None

    def fetch(self, elsewhere: Elsewhere, resume: Resume = "auto") -> None:
        """Have the newest checkpoint brought that is kept elsewhere, where none is whole here.

        Raises `Refused` when it belongs to another run; nothing has changed then.
        """
        if resume == "auto" and all(fault_of(folder) for folder in reversed(self.shelf.all())):
            self._fetched(elsewhere)

    def _fetched(self, elsewhere: Elsewhere) -> Path | None:
        """What `elsewhere` brings gets its place once it is known to be of this run."""
        missing = [path for path in (self.folder, *self.folder.absolute().parents) if not path.exists()]
        scratch = self.folder / FETCHED
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            brought = elsewhere(scratch)
            return self.shelf.name(brought) if brought is not None and self._is_sound(brought) else None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            for path in missing:
                with suppress(OSError):  # it holds something by now
                    path.rmdir()

    def _is_sound(self, folder: Path) -> bool:
        """Whether a checkpoint is whole, saying so; raises `Refused` when it belongs to another run."""
        if fault := fault_of(folder):
            print(f"{folder}: passed over, {fault}")
            return False
        self._refuse_another(folder, Statement.read(folder))
        print(f"{folder}: taken, it is whole")
        return True

    def _refuse_begun(self, resume: Resume) -> None:
        if resume == "never":
            raise Refused(f"{self.folder}: holds a run already - choose another run folder, or resume it")

    def _refuse_another(self, folder: Path, said: Statement, unsettled: Collection[str] = ()) -> None:
        then, now = (
            {key: value for key, value in one.items() if key not in unsettled} for one in (said.identity, self.identity)
        )
        if changed := differences(then, now):
            raise Refused(
                f"{folder}: belongs to another run ({'; '.join(changed)}) - "
                "choose another run folder, or give back what it had"
            )

    def _write(self, folder: Path, state: Written, score: float | None) -> None:
        state.write(folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        measured = score if score is not None and math.isfinite(score) else None
        Statement(state.samples, measured, self.identity, files).write(folder)
        for path in folder.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
                if hasattr(os, "posix_fadvise"):  # so that the disk is read back, and not the memory before it
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        fsync_folder(folder)
