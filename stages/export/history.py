"""What a run folder has to tell of the student of one checkpoint: its recipe, its cache, its figures, its pictures."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from shards.manifest import MANIFEST_FILE, Manifest
from stages.classes.specification import load_classes
from stages.nets.saved import cache_folder, is_run
from stages.system.refusal import Refused, in_one_line

STUDENT_KEY = "student"

TASK_TYPE, DATASET_TYPE = "text-to-image", "sollune-cache"


def metric_tables(evaluation: Mapping[str, Any]) -> str:
    """Every table of one evaluation; an empty text when nothing was measured."""
    parts = [_fidelity_table(evaluation.get("fidelity") or {}), _paired_table(evaluation.get("paired") or {})]
    parts.append(_velocity_table(evaluation.get("velocity") or {}))
    return "\n\n".join(part for part in parts if part)


def model_index_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The student's own figures, for the head of the card."""
    return [
        EvalResult(
            task_type=TASK_TYPE,
            dataset_type=DATASET_TYPE,
            dataset_name="validation prompts of the teacher's cache",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in _student_metrics(evaluation)
    ]


def _student_metrics(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    velocity = evaluation.get("velocity")
    if velocity:
        yield "relative_squared_error", "held-out velocity error", velocity["velocity"]["overall"]
    for error in (evaluation.get("paired") or {}).get(STUDENT_KEY, ()):
        if error["score"] is not None:
            yield "paired_noise_score", f"paired-noise score at {error['steps']} steps", error["score"]


def _fidelity_table(fidelity: Mapping[str, Any]) -> str:
    if not fidelity:
        return ""
    names = list(next(iter(fidelity.values()))["by_attribute"])
    rows = [[who, *_percent_cells(one), str(one["pictures"])] for who, one in fidelity.items()]
    return _markdown_table("Pictures that show what was said, %", ["", *names, "all", "pictures"], rows)


def _percent_cells(fidelity: Mapping[str, Any]) -> list[str]:
    return [f"{100 * share:.1f}" for share in (*fidelity["by_attribute"].values(), fidelity["all_at_once"])]


def _paired_table(paired: Mapping[str, Any]) -> str:
    """The student's endpoint error from the same noise: score 0 is as good as the teacher, 1 unrelated."""
    keys = ("student", "floor", "ceiling", "score")
    rows = [
        [who, str(e["steps"]), *("-" if e[key] is None else f"{e[key]:.4f}" for key in keys)]
        for who, errors in paired.items()
        for e in errors
    ]
    heads = ["", "steps", "error", "teacher's own", "unrelated", "score"]
    return (
        _markdown_table("Paired-noise error: the same noise must give the teacher's picture", heads, rows)
        if rows
        else ""
    )


def _velocity_table(velocity: Mapping[str, Any]) -> str:
    if not velocity:
        return ""
    bins = len(velocity["velocity"]["by_bin"])
    heads = ["", "all", *(f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins))]
    rows = [
        [name, *("-" if cell is None else f"{cell:.4f}" for cell in (one["overall"], *one["by_bin"]))]
        for name, one in (("velocity", velocity["velocity"]), ("guidance difference", velocity["guidance"]))
    ]
    return _markdown_table(f"Relative squared error at {velocity['states']} held-out states", heads, rows)


def _markdown_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


LOCAL_SETTINGS = {"run", "teacher", "device", "processes", "resume", "hub", "classes"}
"""Settings that mean something on the machine of the run alone."""


@dataclass(frozen=True)
class RunHistory:
    """The tale of one run, as far as it was written down."""

    settings: Mapping[str, Any]
    """The run's settings, resolved; empty where none were kept."""
    cache_facts: Mapping[str, Any]
    """The cache's records, samples and manifest hash; empty when the cache is gone."""
    evaluation: Mapping[str, Any]
    """What `sollune evaluate` found of this very checkpoint; empty when nothing was measured."""
    pictures: Mapping[str, Path]
    """Name in the export -> picture of the run."""

    @classmethod
    def from_run(cls, run: Path, samples: int) -> "RunHistory":
        """The history of the checkpoint at `samples`; raises `Refused` for a file that is not what its name says."""
        return cls(
            _read_settings(run / "config.yaml"),
            _read_cache_facts(cache_folder(run)),
            _read_evaluation(run, samples),
            _newest_grid(run, samples),
        )

    @property
    def prompts(self) -> list[str]:
        """The sentences of the run's own sample grid."""
        found: list[str] = (self.settings.get("grid") or {}).get("prompts") or []
        return found


def read_history(run: Path, samples: int) -> RunHistory | None:
    """The history of a run folder, or nothing when there is no run."""
    return RunHistory.from_run(run, samples) if is_run(run) else None


def class_facts(run: Path) -> dict[str, Any]:
    """The classes that a run was fine-tuned on, with their priorities, as a fact; empty for a distillation."""
    file = run / "classes.yaml"
    return {"classes": {spec.name: spec.priority for spec in load_classes(file).classes}} if file.is_file() else {}


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
        (settings,) = sections.values()
        kept = {key: value for key, value in settings.items() if key not in LOCAL_SETTINGS}
    except (yaml.YAMLError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise Refused(
            f"{file}: not the settings of a run ({in_one_line(error)}) - start the run's command again"
        ) from error
    told: dict[str, Any] = _without_local_paths(kept)
    return told


def _without_local_paths(value: Any) -> Any:
    """The same with absolute paths shortened to their last part."""
    if isinstance(value, dict):
        return {key: _without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _read_cache_facts(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return {}
    shards = Manifest.open(folder).shards
    return {
        "manifest_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "records": sum(shard.records for shard in shards),
        "samples": sum(shard.draws for shard in shards),
    }


def _read_evaluation(run: Path, samples: int) -> dict[str, Any]:
    """What was measured of this very checkpoint; figures of another one are not this student's."""
    file = run / "evaluation.json"
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        (
            metric_tables(found),
            model_index_results(found),
        )  # figures of another program fail here, where their file is known
        return found if found["samples"] == samples else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{file}: no evaluation of ours ({in_one_line(error)}) - measure again or remove it") from error


def _newest_grid(run: Path, samples: int) -> dict[str, Path]:
    """The run's newest grid up to `samples`."""
    drawn = [path for path in (run / "grids").glob("*.png") if path.stem.isdecimal() and int(path.stem) <= samples]
    return {"samples.png": max(drawn, key=lambda path: int(path.stem))} if drawn else {}
