"""How far the run folder of a conversion has come, and results on the disk beside all that they depend on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from stages.convert.stored import read_result, to_json
from stages.export.history import CONVERSION_FILE
from stages.nets.run_folder import COMPLETE_MARK, is_run
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused, in_one_line
from stages.train.checkpoint_store import identity_differences

START_FILE, VERDICT_FILE = "start.json", CONVERSION_FILE
MADE_FROM = "made_from"
Result = TypeVar("Result")


@dataclass(frozen=True)
class ResultFile(Generic[Result]):
    """The JSON file of a result, with what it was made from as one more entry."""

    kind: type[Result]
    path: Path
    made_from: Mapping[str, Any]

    def read(self) -> Result | None:
        """The result; None where there is none yet.

        Raises `Refused` for a broken file, and for one that was made from something else.
        """
        if not self.path.exists():
            return None
        try:
            then = json.loads(self.path.read_text(encoding="utf-8"))[MADE_FROM]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise Refused(
                f"{self.path}: cannot be read ({in_one_line(error)}) - remove it, and the same command makes it again"
            ) from error
        if changed := identity_differences(then, json.loads(json.dumps(self.made_from))):
            raise Refused(
                f"{self.path}: belongs to another conversion ({'; '.join(changed)}) - "
                "choose another folder with --out, or give back what it had"
            )
        return read_result(self.kind, self.path)

    def write(self, result: Result, **facts: int) -> None:
        """Write the result and facts beside it, whole or not at all."""
        content = {**json.loads(to_json(result)), **facts, MADE_FROM: dict(self.made_from)}
        atomic_write(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def refuse_foreign_run(folder: Path) -> None:
    """Raise `Refused` where a folder holds a run that is no conversion."""
    checkpoints = any((folder / "checkpoints").glob("*"))
    if (is_run(folder) or checkpoints) and not (folder / START_FILE).exists():
        raise Refused(f"{folder}: holds a run that is no conversion - choose another folder with --out")


def is_complete(folder: Path) -> bool:
    """Whether all was made, the export included."""
    return (folder / COMPLETE_MARK).is_file() and (folder / "export" / "diffusers").is_dir()
