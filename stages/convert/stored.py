"""Results of a conversion as JSON files; a number that is not finite is null there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from stages.evaluate.report import replace_non_finite
from stages.system.refusal import Refused, in_one_line

Result = TypeVar("Result")
ALWAYS_NUMBERS = ("student", "ratio", "distance")
"""Entries that are null only where the number is not finite."""


def to_json(result: Any) -> str:
    """The content of the file of a dataclass."""
    return json.dumps(replace_non_finite(asdict(result)), indent=1, allow_nan=False) + "\n"


def read_result(kind: type[Result], path: Path) -> Result:
    """What `to_json` wrote of this dataclass; raises `Refused` for a file that is broken or another's."""
    try:
        content = _with_nan(json.loads(path.read_text(encoding="utf-8")))
        return TypeAdapter(kind).validate_python(content)
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"{path}: cannot be read ({in_one_line(error)}) - delete it and start the run's command again"
        ) from error


def _with_nan(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [float("nan") if inner is None else _with_nan(inner) for inner in value]
    return float("nan") if value is None and key in ALWAYS_NUMBERS else value
