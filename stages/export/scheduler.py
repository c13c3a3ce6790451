"""The scheduler that lies in an export, and its settings as they are written and read back."""

import json
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from stages.nets.files import read_json
from stages.nets.scheduler import flow_scheduler, vp_scheduler
from stages.nets.student import Student

CONFIG = Path("scheduler") / "scheduler_config.json"


def scheduler_of(student: Student, teacher_folder: Path, flow_shift: float) -> SchedulerMixin:
    """The scheduler that samples what this student answers with."""
    return flow_scheduler(flow_shift) if student.vp is None else vp_scheduler(teacher_folder)


def written_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The scheduler's settings as its config file holds them, without the versions of programs."""
    return _settings(json.loads(scheduler.to_json_string()))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a folder's scheduler config, to be compared with `written_config`."""
    return _settings(read_json(folder / CONFIG))


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_diffusers_version", "_use_default_values")}
