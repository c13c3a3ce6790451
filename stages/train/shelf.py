"""The folder of checkpoints: each gets its name when it is whole, and loses it before it is deleted, in one step each.

A checkpoint is hidden (.000012800.partial) until all of it was read back, and again (.000012800.gone) while it is
deleted. So whatever has a final name was whole once, at whichever moment a process dies.
"""

import shutil
from pathlib import Path

from configs.atomic import fsync_folder
from shards.stamps import Facts
from stages.train.retention import KeepConfig, staying
from stages.train.statement import Broken, Statement, fault_of, samples_of

PARTIAL, GONE = ".partial", ".gone"


class Shelf:
    """The checkpoints that lie in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, list[Facts]] = {}

    def all(self) -> list[Path]:
        """Every checkpoint by age, whole or not."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())

    def nameless(self) -> list[Path]:
        """Every checkpoint that is whole but for its name, by age: `tidy` gives it one."""
        hidden = sorted(self.folder.glob(f".[0-9]*{PARTIAL}"))
        return [partial for partial in hidden if fault_of(partial) is None]

    def place(self, samples: int) -> Path:
        """The final name of a checkpoint."""
        return self.folder / f"{samples:09d}"

    def hidden(self, samples: int) -> Path:
        """The name of a checkpoint that is being written."""
        return self.folder / f".{samples:09d}{PARTIAL}"

    def is_whole(self, folder: Path) -> bool:
        """Whether this process has read all of it since anybody wrote to it, and found it whole."""
        facts = [Facts.of(path.stat()) for path in sorted(folder.iterdir())]
        if self._read.get(folder.name) != facts:
            if fault_of(folder) is not None:
                return False
            self._read[folder.name] = facts
        return True

    def name(self, partial: Path) -> Path:
        """Give a whole checkpoint its final name; what stood there was passed over as broken, or is the same."""
        final = self.place(samples_of(partial))
        if final.exists():
            self.discard(final)
        partial.replace(final)
        fsync_folder(self.folder)
        self._read[final.name] = self._read.pop(partial.name, [])
        return final

    def discard(self, folder: Path) -> None:
        """Take a checkpoint's name away; `sweep` deletes it."""
        gone = self.folder / f".{folder.name}{GONE}"
        shutil.rmtree(gone, ignore_errors=True)
        folder.replace(gone)
        self._read.pop(folder.name, None)

    def sweep(self) -> None:
        """Delete what was discarded; what a network's disk will not let go yet goes the next time."""
        for gone in self.folder.glob(f".[0-9]*{GONE}"):
            shutil.rmtree(gone, ignore_errors=True)

    def rotate(self, newest: Path, keep: KeepConfig) -> None:
        """Delete what need not stay, now that `newest` has been read back; a broken one takes nobody's place.

        Left alone is what is newer - broken, or it would have been taken - and what does not speak our schema.
        """
        scores: dict[int, float | None] = {}
        for folder in self.all():
            try:
                said = Statement.read(folder)
            except Broken:
                continue
            if samples_of(folder) <= samples_of(newest):
                scores[samples_of(folder)] = said.score
        if scores.keys() != staying(scores, keep):
            whole = {samples: score for samples, score in scores.items() if self.is_whole(self.place(samples))}
            for samples in sorted(scores.keys() - staying(whole, keep)):
                self.discard(self.place(samples))
        self.sweep()

    def tidy(self) -> None:
        """Finish what a killed process left half done: name what is whole, remove what is half there."""
        for partial in sorted(self.folder.glob(f".[0-9]*{PARTIAL}")):
            if fault_of(partial) is None:
                print(f"{partial}: whole but for its name, which it gets")
                self.name(partial)
            else:
                print(f"{partial}: half-written, removed")
                shutil.rmtree(partial)
        self.sweep()
