"""Checkpoints: a folder each, named by the samples seen, whole or not there; a run goes on from the newest whole one.

checkpoints/000012800/  student.safetensors  ema.safetensors  optimizer.pt  memory.pt  state.json
state.json comes last and holds the hashes of the others.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from configs.atomic import fsync_folder
from configs.refusal import Refused
from stages.train.hooks import Elsewhere
from stages.train.state import TrainingState

SCHEMA = 3
PARTIAL = ".partial"
MARGIN_BYTES = 1 << 20

Resume = Literal["auto", "never"]


class Checkpoints:
    """The checkpoints of one run.

    `identity` is what the weights depend on besides the number of samples (recipe, configuration), as JSON values;
    a run with another identity is refused. The `keep` newest ones stay.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def save(self, state: TrainingState, score: float | None = None) -> Path:
        """Write a checkpoint, read it back, and only then delete the oldest ones beyond `keep`.

        `score` is the error that validation found, if any.
        Raises `Refused` when the disk has no room; nothing half-written stays then.
        """
        self.refuse_small_disk(state)
        final = self.folder / f"{state.samples:09d}"
        partial = self.folder / f".{final.name}{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            self._write(partial, state, score)
            # Only a checkpoint that was passed over as broken can stand here under the same name.
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
            fsync_folder(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch.save ends with words of its own; the disk's stand in the error before.
            reason = str(error.__context__ or error).splitlines()[0]
            raise Refused(
                f"{final}: cannot be written ({reason}) - free some space and start again: it goes on"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if fault := fault_of(final):
            raise Refused(f"{final}: read back differently from what was written ({fault}) - check the disk")
        self._prune()
        return final

    def refuse_small_disk(self, state: TrainingState) -> None:
        """Raise `Refused` when one more checkpoint does not fit."""
        needed = state.bytes() + MARGIN_BYTES
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise Refused(
                f"{self.folder}: {free / 2**20:.1f} MiB free, a checkpoint takes {needed / 2**20:.1f} MiB - "
                "free some space or choose another run folder, then start again: it goes on"
            )

    def restore(self, state: TrainingState, resume: Resume, elsewhere: Elsewhere | None = None) -> Path | None:
        """Bring `state` to the newest whole checkpoint, saying which it is and which were passed over and why.

        When none is whole, `elsewhere` is asked for one. None when it has none either: the run starts at its beginning.
        """
        for leftover in self.folder.glob(f".*{PARTIAL}"):
            print(f"{leftover}: half-written, removed")
            shutil.rmtree(leftover)
        for folder in reversed(self._folders()):
            if resume == "never":
                raise Refused(f"{self.folder}: holds a run already - choose another run folder, or resume it")
            if fault := fault_of(folder):
                print(f"{folder}: passed over, {fault}")
                continue
            return self._taken(folder, state)
        brought = elsewhere(self.folder) if elsewhere is not None else None
        return None if brought is None else self._taken(brought, state)

    def _taken(self, folder: Path, state: TrainingState) -> Path:
        self._refuse_other_run(folder)
        state.read(folder, int(folder.name))
        return folder

    def _folders(self) -> list[Path]:
        """Every checkpoint by age, whole or not."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())

    def _write(self, folder: Path, state: TrainingState, score: float | None) -> None:
        state.write(folder)
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        facts = {"schema": SCHEMA, "samples": state.samples, "score": score, "identity": self.identity, "files": files}
        (folder / "state.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(folder)

    def _refuse_other_run(self, folder: Path) -> None:
        then = json.loads((folder / "state.json").read_text(encoding="utf-8"))["identity"]
        if changed := differences(then, self.identity):
            raise Refused(
                f"{folder}: belongs to another run ({'; '.join(changed)}) - "
                "choose another run folder, or give back what it had"
            )

    def _prune(self) -> None:
        """Delete the oldest checkpoints beyond `keep`; called when the newest was just read back."""
        for folder in self._folders()[: -self.keep]:
            shutil.rmtree(folder)


def fault_of(folder: Path) -> str | None:
    """Why this checkpoint cannot be trusted; None when every file is what state.json says."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        schema, samples, files = content["schema"], content["samples"], content["files"]
    except FileNotFoundError:
        return "state.json is missing, so it was never finished"
    except (ValueError, KeyError, TypeError):
        return "state.json cannot be read"
    if schema != SCHEMA:
        return f"its schema is {schema}, this program reads {SCHEMA}"
    if samples != int(folder.name):
        return f"state.json speaks of {samples} samples"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is not the file that was written"
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
