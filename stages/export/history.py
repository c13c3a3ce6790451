"""What a run folder records of one checkpoint: its settings, its cache, its metrics, its pictures.

The metrics are rendered as the Markdown tables and the `model-index` of the model card.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from shards.manifest import MANIFEST_FILE, Manifest
from stages.classes.specification import load_classes
from stages.export.landings import read_landing_errors
from stages.export.measured_loras import HEADS, lora_rows, read_measured_loras
from stages.export.tables import format_cell, markdown_table
from stages.nets.run_folder import cache_folder, is_run
from stages.system.refusal import Refused, in_one_line
from stages.train.journal import JOURNAL_FILE

STUDENT_KEY, POLISHED_KEY = "student", "polished"
CONVERSION_FILE = "convert.json"
"""The verdict of a conversion, in its run folder."""
LOCAL_SETTINGS = {
    "run", "teacher", "device", "processes", "resume", "hub", "classes",
    "base", "base_teacher", "mix", "out", "plan", "workers", "no_disk_check",
}  # fmt: skip
"""Settings that mean something on the machine of the run alone."""


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

    @property
    def prompts(self) -> list[str]:
        """The prompts of the run's comparison grid."""
        prompts: list[str] = (self.settings.get("grid") or {}).get("prompts") or []
        return prompts


def read_history(run: Path, samples: int) -> RunHistory | None:
    """The history of the checkpoint at `samples`, or nothing when there is no run.

    Raises `Refused` for a file that is not what its name says.
    """
    if not is_run(run):
        return None
    return RunHistory(
        _read_settings(run / "config.yaml"),
        _read_cache_facts(cache_folder(run)),
        _read_evaluation(run / "evaluation.json", samples),
        _newest_grid(run / "grids", samples),
        _read_conversion(run / CONVERSION_FILE, samples),
        read_measured_loras(run / "loras", samples),
        read_landing_errors(run / JOURNAL_FILE, samples),
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


def _read_evaluation(file: Path, samples: int) -> dict[str, Any]:
    """The evaluation of this very checkpoint; that of another one does not describe this student."""
    if not file.is_file():
        return {}
    try:
        evaluation: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        metric_tables(evaluation), model_index_results(evaluation)  # metrics of another program fail here
        return evaluation if evaluation["samples"] == samples else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{file}: no evaluation of ours ({in_one_line(error)}) - measure again or remove it") from error


def _read_conversion(file: Path, samples: int) -> dict[str, Any]:
    """The verdict of this very checkpoint."""
    if not file.is_file():
        return {}
    try:
        conversion: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        conversion_table(conversion)
        return conversion if conversion["samples"] == samples else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(
            f"{file}: no verdict of ours ({in_one_line(error)}) - remove it and start the run's command again"
        ) from error


def _newest_grid(folder: Path, samples: int) -> dict[str, Path]:
    """The run's newest comparison grid up to `samples`."""
    grids = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdecimal()}
    numbers = [number for number in grids if number <= samples]
    return {"samples.png": grids[max(numbers)]} if numbers else {}


def metric_tables(evaluation: Mapping[str, Any]) -> str:
    """Every table of one evaluation; an empty text when nothing was measured."""
    tables = {
        "fidelity": _fidelity_table,
        "paired": _paired_table,
        "velocity": _velocity_table,
        "by_size": _size_table,
    }
    texts = [table(evaluation[name]) for name, table in tables.items() if evaluation.get(name)]
    return "\n\n".join(filter(None, texts))


def lora_table(loras: Sequence[Mapping[str, Any]]) -> str:
    """The LoRAs that were measured; an empty text where there are none."""
    return markdown_table("LoRAs of the teacher on this model", HEADS, lora_rows(loras))


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
    if velocity := evaluation.get("velocity"):
        yield "relative_squared_error", "held-out velocity error", velocity["velocity"]["overall"]
    for error in (evaluation.get("paired") or {}).get(STUDENT_KEY, ()):
        if error["score"] is not None:
            yield "paired_noise_score", f"paired-noise score at {error['steps']} steps", error["score"]
    for size, errors in (evaluation.get("by_size") or {}).items():
        if size == evaluation["size"]:
            continue
        for error in errors["paired"]:
            if error["score"] is not None:
                yield "paired_noise_score", f"paired-noise score at {error['steps']} steps, {size}", error["score"]


def _fidelity_table(fidelity: Mapping[str, Any]) -> str:
    attributes = list(next(iter(fidelity.values()))["by_attribute"])
    rows = []
    for model, metrics in fidelity.items():
        shares = (*metrics["by_attribute"].values(), metrics["all_at_once"])
        rows.append([model, *(f"{100 * share:.1f}" for share in shares), str(metrics["pictures"])])
    return markdown_table("Pictures that show what the prompt states, %", ["", *attributes, "all", "pictures"], rows)


def _paired_table(paired: Mapping[str, Any]) -> str:
    """The student's endpoint error from the same noise: score 0 is as good as the teacher, 1 unrelated."""
    rows = [
        [model, str(error["steps"]), *(format_cell(error[key]) for key in ("student", "floor", "ceiling", "score"))]
        for model, errors in paired.items()
        for error in errors
    ]
    heads = ["", "steps", "error", "teacher's own", "unrelated", "score"]
    return markdown_table("Paired-noise error: the same noise must give the teacher's picture", heads, rows)


def conversion_table(conversion: Mapping[str, Any]) -> str:
    """Paired errors of the polished student, of its possible starts and of the base's student; "" for no conversion.

    Beside each the ratio of the polished student's error to it, with its 95 % interval.
    """
    rows = []
    for model, errors in (conversion.get("errors") or {}).items():
        ratios = {one["steps"]: one for one in conversion["comparisons"].get(model, ())}
        for error in errors:
            ratio = ratios.get(error["steps"], {})
            rows.append(
                [
                    model,
                    str(error["steps"]),
                    *(format_cell(error[key]) for key in ("student", "floor", "ceiling", "score")),
                    _interval(error["interval"]),
                    format_cell(ratio.get("ratio")),
                    _interval(ratio.get("ratio_interval")),
                ]
            )
    heads = ["", "steps", "error", "teacher's own", "unrelated", "score", "95 %", "polished / this", "95 %"]
    title = (
        f"Conversion: paired-noise error on {conversion.get('prompts')} prompts at {conversion.get('size')}; base is "
        "the student of the base model, unchanged; delta that student plus what the fine-tune changed; graft the "
        "fine-tune with its time embedding re-solved; polished is this model"
    )
    return markdown_table(title, heads, rows)


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _velocity_table(velocity: Mapping[str, Any]) -> str:
    bins = len(velocity["velocity"]["by_bin"])
    heads = ["", "all", *(f"s {i / bins:.1f}-{(i + 1) / bins:.1f}" for i in range(bins))]
    rows = [
        [name, *map(format_cell, (error["overall"], *error["by_bin"]))]
        for name, error in (("velocity", velocity["velocity"]), ("guidance difference", velocity["guidance"]))
    ]
    return markdown_table(f"Relative squared error at {velocity['states']} held-out states", heads, rows)


def _size_table(by_size: Mapping[str, Any]) -> str:
    """The student's paired scores and velocity error at each picture size; none where one alone was measured."""
    steps = sorted({error["steps"] for errors in by_size.values() for error in errors["paired"]})
    rows = []
    for size, errors in by_size.items():
        scores = {error["steps"]: error["score"] for error in errors["paired"]}
        rows.append([size, *(format_cell(scores.get(n)) for n in steps), format_cell(errors["velocity"])])
    heads = ["size", *(f"score at {n} steps" for n in steps), "velocity error"]
    return markdown_table("The student at each picture size (width x height)", heads, rows)
