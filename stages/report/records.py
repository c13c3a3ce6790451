"""What the files of a run folder hold, checked: the lines of its journal, its measurements, its hashes, its grids."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stages.export.folder import FACTS_FILE
from stages.export.history import RunHistory, StoredGate, read_history
from stages.nets.run_folder import (
    BASE_PLACE,
    COMPLETE_MARK,
    FAST_FOLDER,
    ORIGIN_FILE,
    Origin,
    is_run,
    newest_checkpoint,
)
from stages.report.charts import drawable
from stages.system.refusal import Refused, in_one_line
from stages.train.journal import JOURNAL_FILE, read_events, read_step_lines

GRIDS_FOLDER, CLASSES_FILE = "grids", "classes.yaml"
MAX_DEPTH = 5
"""How many folders below a given one runs are looked for: a study's lie in OUT/STUDY/REGIME/ARM/seedN/distill."""
ANY_SAMPLES, MAX_SAMPLES = 1 << 62, 10**15
"""Above all, and the most of a line: neighbours of larger ones are the same place on an axis."""
JOB_FILE = "job.json"
"""Of `sollune ablate`, beside the folder of a run that it made; `stages.ablation.jobs` would take long to import."""


def _drawable(value: Any) -> Any:
    return drawable(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Number = Annotated[float | None, BeforeValidator(_drawable)]
"""A number of a journal; None for one that was not measured, is not finite, or is too large to be drawn."""
Numbers = Mapping[str, Number]
ByTime = Sequence[Number]
"""One number for each equal part of s, 0 (the picture) to 1 (noise)."""


class Line(BaseModel):
    """A line of the journal; what the page does not show is left out."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    samples: int = Field(ge=0, le=MAX_SAMPLES)


class StepLine(Line):
    """The means over the training steps since the line before."""

    loss: Number = None
    flow: Number = None
    guidance: Number = None
    block_term: Number = None
    blocks: Numbers = {}
    lambdas: Numbers = {}
    block_weight: Number = None
    flow_by_s: ByTime = ()
    flow_by_class: Numbers = {}
    learning_rate: Number = None
    samples_per_second: Number = None
    window_seconds: Number = None
    paused_seconds: Number = None


class ValidationLine(Line):
    """Errors at fixed states that were measured at a checkpoint; None for those that the run does not measure."""

    held_out: Number = None
    held_out_by_s: ByTime = ()
    held_out_guidance: Number = None
    seen: Number = None
    seen_by_s: ByTime = ()
    seen_new_noise: Number = None
    seen_new_noise_by_s: ByTime = ()
    landing: Number = None
    landing_by_s: ByTime = ()
    end: Number = None


class ExamLine(Line):
    """The measurements of each class at a checkpoint."""

    wrong: Number = None
    all: Numbers = {}
    paired_error: Numbers = {}
    lost: Numbers = {}


LineT = TypeVar("LineT", bound=Line)


@dataclass(frozen=True)
class RunRecord:
    """One run, finished or not."""

    name: str
    """How the page calls it: the last parts of its folder."""
    folder: Path
    origin: Origin
    history: RunHistory
    """Settings, cache and measurements of the checkpoint at `samples`."""
    samples: int
    """Training samples of its final checkpoint, or its newest, or else of the journal's last line."""
    complete: bool
    steps: Sequence[StepLine]
    validations: Sequence[ValidationLine]
    exams: Sequence[ExamLine]
    classes: Sequence[Mapping[str, str]]
    """The rows of the final table by class, as they are written."""
    export: Mapping[str, Any]
    """The facts of its export; empty where there is none."""
    gates: Sequence[StoredGate]
    """The limits of its evaluation, if any."""
    grids: Mapping[int, Path]
    """Training samples -> comparison grid."""
    unlike_settings: Mapping[str, Any]
    """What decided its weights beside its settings and its seed: cache, classes, the run it began with, its arm."""

    @property
    def seen_samples(self) -> int:
        """The samples that training has reached."""
        return max([self.samples, *(line.samples for line in self.steps[-1:])])

    @property
    def max_samples(self) -> int | None:
        """The samples that training was to reach; None where no settings are kept."""
        settings = self.history.settings
        match settings.get("fast") if self.origin.windows else settings:
            case {"train": {"max_samples": int(value)}} if not isinstance(value, bool) and 0 < value <= MAX_SAMPLES:
                return value
        return None


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders that are named, or lie in a named one; raises `Refused` where there are none."""
    runs: dict[Path, Path] = {}
    for folder in folders:
        below = [folder] if is_run(folder) else sorted(_runs_below(folder, MAX_DEPTH), key=_training_order)
        if not below:
            problem = "holds no run" if folder.is_dir() else "is no folder"
            raise Refused(f"{folder}: {problem} ({ORIGIN_FILE} is missing) - name a run such as runs/tiny/distill")
        runs |= {run.resolve(): run for run in below if run.resolve() not in runs}
    return list(runs.values())


def _training_order(run: Path) -> tuple[int, tuple[str, ...], int, str]:
    """Distillation first, then more steps before fewer, then the rest by name."""
    kinds = {"distill": 0, FAST_FOLDER: 1}
    kind = kinds.get(run.parent.name if run.name.isdecimal() else run.name, 2)
    return kind, run.parent.parts, -int(run.name) if run.name.isdecimal() else 0, run.name


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    """Every run folder in a folder, not below another run; beside a job, not those that it links to read them."""
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    except OSError as error:
        raise Refused(f"{folder}: cannot be read ({error.strerror}) - name a run that can") from error
    is_job = (folder / JOB_FILE).is_file()
    for path in inner:
        if is_job and path.is_symlink():
            continue
        if is_run(path):
            yield path
        elif depth > 1:
            yield from _runs_below(path, depth - 1)


def read_run(folder: Path, name: str) -> RunRecord:
    """Everything that the page shows of a run; raises `Refused`, naming the file, for what is not what it should be."""
    origin = Origin.open(folder)
    journal = (folder / JOURNAL_FILE).exists()
    raw_steps = read_step_lines(folder) if journal else []
    events = {kind: read_events(folder, kind, ANY_SAMPLES) if journal else [] for kind in ("validation", "classes")}
    steps = _lines(StepLine, folder, raw_steps)
    samples = _final_samples(folder) or newest_checkpoint(folder) or (steps[-1].samples if steps else 0)
    history = read_history(folder, samples)
    assert history is not None  # it is a run
    return RunRecord(
        name=name,
        folder=folder,
        origin=origin,
        history=history,
        samples=samples,
        complete=(folder / COMPLETE_MARK).is_file(),
        steps=steps,
        validations=_lines(ValidationLine, folder, events["validation"]),
        exams=_lines(ExamLine, folder, events["classes"]),
        classes=_class_rows(folder / "per_class.csv"),
        export=_read_json(folder / "export" / "diffusers" / FACTS_FILE),
        gates=[StoredGate.model_validate(gate) for gate in history.evaluation.get("gates") or ()],
        grids={int(path.stem): path for path in sorted((folder / GRIDS_FOLDER).glob("*.png")) if path.stem.isdecimal()},
        unlike_settings=_unlike_settings(folder, origin),
    )


def _unlike_settings(folder: Path, origin: Origin) -> dict[str, Any]:
    classes = folder / CLASSES_FILE
    return {
        "windows": origin.windows,
        "recipe": origin.recipe_sha256,
        "base": {key: value for key, value in (origin.base or {}).items() if key != BASE_PLACE},
        "classes": hashlib.sha256(classes.read_bytes()).hexdigest() if classes.is_file() else None,
        # Arms of a study may differ in what no setting says, such as a defect.
        "arm": _arm(folder.parent / JOB_FILE),
    }


def _arm(file: Path) -> tuple[Any, ...] | None:
    """Study, regime and arm of a job; None for a file of another program."""
    try:
        job = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return tuple(job.get(key) for key in ("study", "regime", "arm")) if isinstance(job, dict) else None


def run_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each run: as many last parts of its folder as tell it from the others, at least two."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _lines(kind: type[LineT], folder: Path, lines: Sequence[Mapping[str, Any]]) -> list[LineT]:
    read = list[LineT]()
    for line in lines:
        try:
            read.append(kind.model_validate(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field, reason = ".".join(map(str, first["loc"])), in_one_line(ValueError(first["msg"]), 80)
            raise Refused(
                f"{folder / JOURNAL_FILE}: the line at {line['samples']} samples: {field}: {reason} - "
                "remove the line, or move the file away"
            ) from error
    return read


def _final_samples(folder: Path) -> int:
    """The checkpoint that a finished run chose; 0 for none."""
    mark = folder / COMPLETE_MARK
    text = mark.read_text(encoding="utf-8", errors="replace").strip() if mark.is_file() else ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{file}: cannot be read ({in_one_line(error)}) - make it again, or remove it") from error


def _class_rows(file: Path) -> list[dict[str, str]]:
    """The rows of the table that a fine-tuning by classes writes at its end."""
    if not file.is_file():
        return []
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            rows = [dict(row) for row in csv.DictReader(stream, strict=True)]
    except (OSError, ValueError, csv.Error) as error:
        raise Refused(f"{file}: cannot be read ({in_one_line(error)}) - remove it, or finish the run again") from error
    if any("class" not in row or None in row or None in row.values() for row in rows):
        raise Refused(f"{file}: no table by class - remove it, or finish the run again")
    return rows
