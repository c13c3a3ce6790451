"""What a run folder has to tell of the student of one checkpoint: its recipe, its cache, its figures, its pictures."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.refusal import Refused, in_one_line
from shards.manifest import NAME, Manifest
from stages.classes import load_classes
from stages.export.figures import results, tables
from stages.nets.saved import cache_of, is_run

LOCAL = {"run", "teacher", "device", "processes", "resume", "hub", "classes"}
"""Settings that mean something on the machine of the run alone."""


@dataclass(frozen=True)
class History:
    """The tale of one run, as far as it was written down."""

    recipe: Mapping[str, Any]
    """The run's settings, resolved; empty where none were kept."""
    cache: Mapping[str, Any]
    """The cache's records, samples and manifest hash; empty when the cache is gone."""
    evaluation: Mapping[str, Any]
    """What `sollune evaluate` found of this very checkpoint; empty when nothing was measured."""
    pictures: Mapping[str, Path]
    """Name in the export -> picture of the run."""

    @classmethod
    def of(cls, run: Path, samples: int) -> "History":
        """The history of the checkpoint at `samples`; raises `Refused` for a file that is not what its name says."""
        return cls(_recipe(run / "config.yaml"), _cache(cache_of(run)), _evaluation(run, samples), _grids(run, samples))

    @property
    def prompts(self) -> list[str]:
        """The sentences of the run's own sample grid."""
        found: list[str] = (self.recipe.get("grid") or {}).get("prompts") or []
        return found


def history_of(run: Path, samples: int) -> History | None:
    """The history of a run folder, or nothing when there is no run."""
    return History.of(run, samples) if is_run(run) else None


def classes_of(run: Path) -> dict[str, Any]:
    """The classes that a run was fine-tuned on, with their priorities, as a fact; empty for a distillation."""
    file = run / "classes.yaml"
    return {"classes": {spec.name: spec.priority for spec in load_classes(file).classes}} if file.is_file() else {}


def _recipe(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
        (settings,) = sections.values()
        kept = {key: value for key, value in settings.items() if key not in LOCAL}
    except (yaml.YAMLError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise Refused(
            f"{file}: not the settings of a run ({in_one_line(error)}) - start the run's command again"
        ) from error
    told: dict[str, Any] = _without_places(kept)
    return told


def _without_places(value: Any) -> Any:
    """The same with absolute paths shortened to their last part."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _cache(folder: Path) -> dict[str, Any]:
    file = folder / NAME
    if not file.is_file():
        return {}
    shards = Manifest.open(folder).shards
    return {
        "manifest_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "records": sum(shard.records for shard in shards),
        "samples": sum(shard.draws for shard in shards),
    }


def _evaluation(run: Path, samples: int) -> dict[str, Any]:
    """What was measured of this very checkpoint; figures of another one are not this student's."""
    file = run / "evaluation.json"
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        tables(found), results(found)  # figures of another program fail here, where their file is known
        return found if found["samples"] == samples else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{file}: no evaluation of ours ({in_one_line(error)}) - measure again or remove it") from error


def _grids(run: Path, samples: int) -> dict[str, Path]:
    """The run's newest grid up to `samples`."""
    drawn = [path for path in (run / "grids").glob("*.png") if path.stem.isdecimal() and int(path.stem) <= samples]
    return {"samples.png": max(drawn, key=lambda path: int(path.stem))} if drawn else {}
