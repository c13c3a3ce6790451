"""Trackers of the journal's numbers: TensorBoard, trackio, W&B; a failure of one never ends a run."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from configs.values import Strict
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

TrackerName = Literal["tensorboard", "wandb", "trackio"]
EMPTY_MAPPING: Mapping[str, Any] = {}
TRACKING_FILE = "tracking.json"
MAX_FAILURES = 3
"""In a row, before a tracker is given up: waiting for a dead network would slow the run down for good."""


class TrackingConfig(Strict):
    """Where the journal's numbers go besides journal.jsonl."""

    to: tuple[TrackerName, ...] = Field(
        ("tensorboard",), description="tensorboard, wandb, trackio, or several; in a file, [] for none"
    )
    project: str = Field("sollune", min_length=1, description="project at trackio or W&B")
    name: str | None = Field(None, description="the run's name there; none: the last two folders of its path")


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run folder; steps after `samples` of an earlier process are hidden."""

    def __init__(self, folder: Path, samples: int) -> None:
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=samples + 1)

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """Write one scalar for each name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)

    def close(self) -> None:
        """Flush to disk."""
        self._writer.close()


class OnlineTracker:
    """trackio or W&B, whose interfaces agree; a resumed run continues under its name.

    accelerate's trackers would do the same, but need its global state.
    """

    def __init__(
        self, name: TrackerName, config: TrackingConfig, folder: Path, samples: int, run_config: Mapping[str, Any]
    ) -> None:
        run = config.name or "-".join(folder.absolute().parts[-2:])
        options: dict[str, Any] = {"project": config.project, "name": run, "config": dict(run_config)}
        self._is_wandb = name == "wandb"
        if self._is_wandb:
            # W&B identifies a run by an id that is never reused, so a folder that starts anew takes a new one.
            options |= {"id": _wandb_run_id(folder, is_new=samples == 0), "resume": "allow", "dir": str(folder)}
        else:
            options["resume"] = "allow" if samples else "never"
        self._run: Any = import_module(name).init(**options)
        if self._is_wandb:
            # W&B drops the numbers of a step below its last one: those of a resumed run would be lost.
            self._run.define_metric("*", step_metric="samples")

    def log(self, values: Mapping[str, float], samples: int) -> None:
        """Send the numbers."""
        self._run.log({**values, "samples": samples}, step=None if self._is_wandb else samples)

    def close(self) -> None:
        """Mark the run as finished, for now."""
        self._run.finish()


Tracker: TypeAlias = TensorBoardTracker | OnlineTracker


class FaultTolerantTracker:
    """A tracker whose exceptions become messages; each call returns the message, or None without a failure."""

    def __init__(self, name: TrackerName, open_tracker: Callable[[], Tracker]) -> None:
        self._name, self._open = name, open_tracker
        self._tracker: Tracker | None = None
        self._failures = 0

    def start(self) -> str | None:
        """Open it, if it is not open."""
        return self._run_guarded(self._open_once)

    def log(self, values: Mapping[str, float], samples: int) -> str | None:
        """Log, opening it first where that failed so far."""
        return self._run_guarded(lambda: self._open_once().log(values, samples))

    def close(self) -> str | None:
        """Close it, if it was ever open."""
        return self._run_guarded(self._tracker.close) if self._tracker else None

    def _open_once(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._open()
        return self._tracker

    def _run_guarded(self, function: Callable[[], object]) -> str | None:
        if self._failures == MAX_FAILURES:
            return None
        try:
            function()
        except Exception as error:  # whatever a tracker or its network raises
            self._failures += 1
            over = "given up for this run" if self._failures == MAX_FAILURES else "tried again at the next line"
            return f"{self._name}: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]} - {over}"
        self._failures = 0
        return None


class Trackers:
    """All trackers of a run; each call returns the messages of those that failed."""

    def __init__(self, trackers: Sequence[FaultTolerantTracker]) -> None:
        self._trackers = trackers

    def start(self) -> list[str]:
        """Open each of them."""
        return [failure for tracker in self._trackers if (failure := tracker.start())]

    def log(self, values: Mapping[str, float], samples: int) -> list[str]:
        """Log to each of them."""
        return [failure for tracker in self._trackers if (failure := tracker.log(values, samples))]

    def close(self) -> list[str]:
        """Close each of them."""
        return [failure for tracker in self._trackers if (failure := tracker.close())]


def refuse_missing_trackers(config: TrackingConfig, section: str = "train") -> None:
    """Raise `Refused` for a tracker that is not installed; `section` is where the command has its training."""
    for name in config.to:
        if find_spec(name) is None:
            raise Refused(f"{section}.tracking.to: {name} is not installed - pip install {name}, or leave it out")


def make_trackers(
    config: TrackingConfig, folder: Path, samples: int, run_config: Mapping[str, Any] = EMPTY_MAPPING
) -> Trackers:
    """The trackers of a run resumed at `samples`; raises `Refused` for one that is not installed."""
    refuse_missing_trackers(config)

    def open_tracker(name: TrackerName) -> Tracker:
        if name == "tensorboard":
            return TensorBoardTracker(folder, samples)
        return OnlineTracker(name, config, folder, samples, run_config)

    return Trackers([FaultTolerantTracker(name, partial(open_tracker, name)) for name in config.to])


def _wandb_run_id(folder: Path, is_new: bool) -> str:
    """W&B's id of the run in this folder, kept in `tracking.json`."""
    path = folder / TRACKING_FILE
    if is_new or not path.exists():
        atomic_write(path, json.dumps({"wandb": uuid.uuid4().hex[:16]}) + "\n")
    return str(json.loads(path.read_text(encoding="utf-8"))["wandb"])


def flatten(line: Mapping[str, Any]) -> dict[str, float]:
    """Names and numbers for a tracker: `blocks/mid`, `flow_by_s/3`."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
        flat |= {name: value} if parts is None else {f"{name}/{key}": part for key, part in parts}
    return {name: value for name, value in flat.items() if name != "samples" and isinstance(value, int | float)}
