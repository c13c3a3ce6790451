"""What a run folder records of one checkpoint: its settings, its cache, its metrics, its pictures; all of it checked.

A measured number that is missing or not finite is None.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from huggingface_hub import EvalResult
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shards.manifest import MANIFEST_FILE, Manifest
from stages.classes.specification import load_classes
from stages.export.landings import read_landing_errors
from stages.export.measured_loras import read_measured_loras
from stages.nets.run_folder import cache_folder, is_run
from stages.system.refusal import Refused, in_one_line
from stages.system.text import parse_measurements
from stages.train.journal import JOURNAL_FILE

STUDENT_KEY, POLISHED_KEY = "student", "polished"
EVALUATION_FILE, CONVERSION_FILE = "evaluation.json", "convert.json"
"""What `sollune evaluate` measured, and the verdict of a conversion, in a run folder."""
LOCAL_SETTINGS = {
    "run", "teacher", "device", "processes", "resume", "hub", "classes",
    "base", "base_teacher", "mix", "out", "plan", "workers", "no_disk_check",
}  # fmt: skip
"""Settings that mean something on the machine of the run alone."""


class Stored(BaseModel):
    """A part of a stored measurement; what is not named here is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


def _none_if_incomplete(ends: Any) -> Any:
    return None if isinstance(ends, list) and None in ends else ends


Number = float | None
"""None for one that was not measured, or is not finite."""
Ends = Annotated[
    Annotated[Sequence[float], Field(min_length=2, max_length=2)] | None, BeforeValidator(_none_if_incomplete)
]
"""The ends of an interval; None where either is."""


class StoredFidelity(Stored):
    """Of a `Fidelity`."""

    by_attribute: Mapping[str, Number]
    all_at_once: Number
    pictures: int


class StoredPaired(Stored):
    """Of a `PairedError`."""

    steps: int
    student: Number
    floor: Number
    ceiling: Number
    score: Number
    interval: Ends = None


class StoredError(Stored):
    """Of a `RelativeError`."""

    overall: Number
    by_bin: Annotated[Sequence[Number], Field(min_length=1)]


class StoredVelocity(Stored):
    """Of `VelocityErrors`."""

    velocity: StoredError
    guidance: StoredError
    states: int


class StoredSize(Stored):
    """Of `SizeErrors`."""

    paired: Sequence[StoredPaired]
    velocity: Number


class StoredStraightness(Stored):
    """Of a `Straightness`."""

    pictures: int
    steps: Mapping[str, int]
    relative: Mapping[str, Number]


class StoredGate(Stored):
    """Of a `GateResult`."""

    name: str
    found: Number
    asked: str
    passed: bool


class StoredEvaluation(Stored):
    """Of an `Evaluation`; a part that an older version did not measure may be missing."""

    samples: int
    size: str | None = None
    fidelity: Mapping[str, StoredFidelity] | None = None
    paired: Mapping[str, Sequence[StoredPaired]] | None = None
    velocity: StoredVelocity | None = None
    by_size: Mapping[str, StoredSize] | None = None
    straightness: StoredStraightness | None = None
    gates: Sequence[StoredGate] | None = None


class StoredRatio(Stored):
    """Of a `PairedComparison`."""

    steps: int
    ratio: Number
    ratio_interval: Ends = None


class StoredConversion(Stored):
    """The verdict of a conversion."""

    samples: int
    errors: Mapping[str, Sequence[StoredPaired]] | None = None
    comparisons: Mapping[str, Sequence[StoredRatio]] | None = None


StoredT = TypeVar("StoredT", StoredEvaluation, StoredConversion)


@dataclass(frozen=True)
class RunHistory:
    """What is recorded of one run."""

    settings: Mapping[str, Any]
    """The run's settings, resolved; empty where none were kept."""
    cache_facts: Mapping[str, Any]
    """The cache's records, samples and manifest hash; empty when the cache is gone."""
    evaluation: Mapping[str, Any]
    """What `sollune evaluate` measured of this very checkpoint; empty when nothing was measured."""
    pictures: Mapping[str, Path]
    """Name in the export -> picture of the run."""
    conversion: Mapping[str, Any] = field(default_factory=dict)
    """What `sollune convert` measured of this very checkpoint; empty for any other run."""
    loras: Sequence[Mapping[str, Any]] = ()
    """What was measured of LoRAs on this very checkpoint."""
    landings: Mapping[str, Any] = field(default_factory=dict)
    """What the training of few steps measured of this very checkpoint; empty for any other run."""
    evaluated_at: int | None = None
    """Training samples of the checkpoint that was evaluated last, which need not be this one."""

    @property
    def prompts(self) -> list[str]:
        """The prompts of the run's comparison grid."""
        match self.settings:
            case {"grid": {"prompts": list(prompts)}}:
                return [prompt for prompt in prompts if isinstance(prompt, str)]
        return []


def read_history(run: Path, samples: int) -> RunHistory | None:
    """The history of the checkpoint at `samples`, or nothing when there is no run.

    Raises `Refused` for a file that is not what its name says.
    """
    if not is_run(run):
        return None
    evaluation = _read_stored(run / EVALUATION_FILE, StoredEvaluation, "evaluation", "measure again or remove it")
    way_out = "remove it and start the run's command again"
    conversion = _read_stored(run / CONVERSION_FILE, StoredConversion, "verdict", way_out)
    return RunHistory(
        _read_settings(run / "config.yaml"),
        _read_cache_facts(cache_folder(run)),
        evaluation.model_dump() if evaluation and evaluation.samples == samples else {},
        _newest_grid(run / "grids", samples),
        conversion.model_dump() if conversion and conversion.samples == samples else {},
        read_measured_loras(run / "loras", samples),
        read_landing_errors(run / JOURNAL_FILE, samples),
        evaluation.samples if evaluation else None,
    )


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
        # Those of the training for few steps stand beside those of the distillation, whichever was done.
        settings = dict(settings.items())
        few_steps = settings.pop("fast", None) or {}
        if settings.get("windows"):
            settings["fast"] = {key: value for key, value in few_steps.items() if key not in {*LOCAL_SETTINGS, "start"}}
        else:
            settings.pop("windows", None)
        return {key: _without_local_paths(value) for key, value in settings.items() if key not in LOCAL_SETTINGS}
    except (yaml.YAMLError, OSError, ValueError, AttributeError, RecursionError) as error:
        reason = in_one_line(error)
        raise Refused(f"{file}: not the settings of a run ({reason}) - start the run's command again") from error


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


def _read_stored(file: Path, kind: type[StoredT], name: str, way_out: str) -> StoredT | None:
    """A measurement of a run, whichever checkpoint it is of; None where there is no file."""
    if not file.is_file():
        return None
    try:
        return kind.model_validate(parse_measurements(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].partition(' or instance')[0]}".removeprefix(": ")
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise Refused(f"{file}: no {name} of ours ({in_one_line(ValueError(reason))}) - {way_out}")


def _newest_grid(folder: Path, samples: int) -> dict[str, Path]:
    """The run's newest comparison grid up to `samples`."""
    grids = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
    numbers = [number for number in grids if number <= samples]
    return {"samples.png": grids[max(numbers)]} if numbers else {}


def model_index_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The student's own metrics, for the head of the card."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="sollune-cache",
            dataset_name="validation prompts of the teacher's cache",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in _student_metrics(evaluation)
    ]


def _student_metrics(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    velocity = evaluation.get("velocity")
    if velocity and velocity["velocity"]["overall"] is not None:
        yield "relative_squared_error", "held-out velocity error", velocity["velocity"]["overall"]
    for error in (evaluation.get("paired") or {}).get(STUDENT_KEY, ()):
        if error["score"] is not None:
            yield "paired_noise_score", f"paired-noise score at {error['steps']} steps", error["score"]
    for size, errors in (evaluation.get("by_size") or {}).items():
        if size == evaluation.get("size"):
            continue
        for error in errors["paired"]:
            if error["score"] is not None:
                yield "paired_noise_score", f"paired-noise score at {error['steps']} steps, {size}", error["score"]
