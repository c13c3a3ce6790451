"""Checkpoints: a folder each, named by the samples seen, whole or not there; a run goes on from the newest whole one.

checkpoints/000012800/  student.safetensors  ema.safetensors  optimizer.pt  memory.pt  state.json
A folder gets this name when all of it was read back; it is hidden (.000012800.partial) before, and again
(.000012800.gone) while it is deleted. So whatever has a final name was whole once, at whichever moment a process dies.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from safetensors import SafetensorError

from configs.atomic import fsync_folder
from configs.refusal import Refused
from shards.stamps import Facts
from stages.train.retention import KeepConfig, staying
from stages.train.statement import Broken, Statement, differences, fault_of, samples_of, sha256

__all__ = ["Checkpoints", "Elsewhere", "KeepConfig", "Resume", "differences", "fault_of", "sha256"]

PARTIAL, GONE = ".partial", ".gone"
MARGIN_BYTES = 1 << 20

Resume = Literal["auto", "never"]
Elsewhere: TypeAlias = Callable[[Path], Path | None]
"""Brings a checkpoint into this folder from where copies lie, and says which; None when there is none."""


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
        self._read: dict[str, list[Facts]] = {}

    def save(self, state: Written, score: float | None = None) -> Path:
        """Write a checkpoint, read it back, give it its name, and only then delete those that need not stay.

        `score` is the validation error at this moment, if one was measured; the checkpoint with the lowest one stays.
        Raises `Refused` when the disk has no room or gives back something else; nothing else has changed then.
        """
        self.refuse_small_disk(state)
        final = self.folder / f"{state.samples:09d}"
        partial = self._hidden(final, PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self._write(partial, state, score)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch.save ends with words of its own; the disk's stand in the error before.
            reason = str(error.__context__ or error).splitlines()[0]
            shutil.rmtree(partial, ignore_errors=True)
            raise Refused(
                f"{final}: cannot be written ({reason}) - free some space and start again: it goes on"
            ) from error
        if not self._is_whole(partial):
            fault = fault_of(partial)
            shutil.rmtree(partial)
            raise Refused(f"{final}: not read back as it was written ({fault}) - check the disk")
        self._name(partial, final)
        self._rotate(final)
        return final

    def refuse_small_disk(self, state: Written) -> None:
        """Raise `Refused` when one more checkpoint does not fit."""
        needed = state.bytes() + MARGIN_BYTES
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise Refused(
                f"{self.folder}: {free / 2**20:.1f} MiB free, a checkpoint takes {needed / 2**20:.1f} MiB - "
                "free some space or choose another run folder, then start again: it goes on"
            )

    def restore(self, state: Restored, resume: Resume = "auto", elsewhere: Elsewhere | None = None) -> Path | None:
        """Bring `state` to the newest whole checkpoint; None when there is none: the run starts at its beginning.

        Says which it took, and which it passed over and why.
        """
        self._tidy()
        found = self._newest(resume, elsewhere)
        if found is not None:
            state.read(found, samples_of(found))
        return found

    def _tidy(self) -> None:
        """Finish what a killed process left half done: name what is whole, remove what is half there."""
        for partial in sorted(self.folder.glob(f".[0-9]*{PARTIAL}")):
            if fault_of(partial) is None:
                print(f"{partial}: whole but for its name, which it gets")
                self._name(partial, self.folder / f"{samples_of(partial):09d}")
            else:
                print(f"{partial}: half-written, removed")
                shutil.rmtree(partial)
        self._sweep()

    def _newest(self, resume: Resume = "auto", elsewhere: Elsewhere | None = None) -> Path | None:
        """The newest whole checkpoint here, else the one that `elsewhere` brings; others stay as they are."""
        for folder in reversed(self._folders()):
            if resume == "never":
                raise Refused(f"{self.folder}: holds a run already - choose another run folder, or resume it")
            if self._is_sound(folder):
                return folder
        brought = elsewhere(self.folder) if elsewhere and resume == "auto" else None
        if brought is not None and self._is_sound(brought):
            return brought
        if self._folders():
            print(f"{self.folder}: no checkpoint is whole, so the run starts at its beginning")
        return None

    def _is_sound(self, folder: Path) -> bool:
        """Whether a checkpoint is whole, saying so; raises `Refused` when it belongs to another run."""
        if fault := fault_of(folder):
            print(f"{folder}: passed over, {fault}")
            return False
        said = Statement.read(folder)
        if changed := differences(said.identity, self.identity):
            raise Refused(
                f"{folder}: belongs to another run ({'; '.join(changed)}) - "
                "choose another run folder, or give back what it had"
            )
        print(f"{folder}: taken, it is whole")
        return True

    def _folders(self) -> list[Path]:
        """Every checkpoint by age, whole or not."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())

    def _hidden(self, final: Path, suffix: str) -> Path:
        return self.folder / f".{final.name}{suffix}"

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

    def _name(self, partial: Path, final: Path) -> None:
        """Give a whole checkpoint its final name; what stood there was passed over as broken, or is the same."""
        if final.exists():
            self._discard(final)
        partial.replace(final)
        fsync_folder(self.folder)
        self._read[final.name] = self._read.pop(partial.name, [])

    def _is_whole(self, folder: Path) -> bool:
        """Whether this process has read all of it since anybody wrote to it, and found it whole."""
        facts = [Facts.of(path.stat()) for path in sorted(folder.iterdir())]
        if self._read.get(folder.name) != facts:
            if fault_of(folder) is not None:
                return False
            self._read[folder.name] = facts
        return True

    def _rotate(self, newest: Path) -> None:
        """Delete what need not stay, now that `newest` has been read back; a broken one takes nobody's place.

        Left alone is what is newer - broken, or it would have been taken - and what does not speak our schema.
        """
        scores: dict[int, float | None] = {}
        for folder in self._folders():
            try:
                said = Statement.read(folder)
            except Broken:
                continue
            if samples_of(folder) <= samples_of(newest):
                scores[samples_of(folder)] = said.score
        if scores.keys() != staying(scores, self.keep):
            whole = {n: score for n, score in scores.items() if self._is_whole(self.folder / f"{n:09d}")}
            for samples in sorted(scores.keys() - staying(whole, self.keep)):
                self._discard(self.folder / f"{samples:09d}")
        self._sweep()

    def _discard(self, folder: Path) -> None:
        """Take a checkpoint's name away in one step, so that it is never half a checkpoint."""
        gone = self._hidden(folder, GONE)
        shutil.rmtree(gone, ignore_errors=True)
        folder.replace(gone)
        self._read.pop(folder.name, None)

    def _sweep(self) -> None:
        """Remove what was discarded; what a network's disk will not let go yet goes the next time."""
        for gone in self.folder.glob(f".[0-9]*{GONE}"):
            shutil.rmtree(gone, ignore_errors=True)
