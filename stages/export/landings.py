"""What the training of few steps measured of a checkpoint, for the model card: the journal's validation."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.export.tables import format_cell, markdown_table

LANDING_KEYS = {"landing", "landing_by_s"}
"""Of a validation of few steps; that of a distillation has others. `end` is there where the cache has landings."""


def read_landing_errors(journal: Path, samples: int) -> dict[str, Any]:
    """The newest validation of the checkpoint at `samples`; empty where the journal has none of few steps.

    An error that is not finite is None.
    """
    if not journal.is_file():
        return {}
    newest: dict[str, Any] = {}
    for text in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # cut by a kill: the journal's own readers leave such a line out too
        if isinstance(line, dict) and line.get("samples") == samples and line.keys() >= LANDING_KEYS:
            newest = _finite(line) if _is_measurement(line) else newest
    return newest


def landing_table(errors: Mapping[str, Any]) -> str:
    """The errors on held-out records; an empty text where there are none."""
    if not errors:
        return ""
    by_window = list(reversed(errors["landing_by_s"]))
    heads = ["", "all", *(f"step {number}" for number in range(1, len(by_window) + 1))]
    rows = [
        ["landing of a single step", *map(format_cell, (errors["landing"], *by_window))],
    ]
    if "end" in errors:
        rows.append(["end of all steps", format_cell(errors["end"]), *("" for _ in by_window)])
    return markdown_table("Relative squared errors on held-out records, each at its own guidance scale", heads, rows)


def _is_measurement(line: Mapping[str, Any]) -> bool:
    """Whether its values are numbers: the journal may have been edited."""
    by_window = line["landing_by_s"]
    values: Sequence[Any] = by_window if isinstance(by_window, list) else [""]
    overall = (line["landing"], line.get("end", 0))
    return all(_is_number(value) for value in overall) and all(value is None or _is_number(value) for value in values)


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with None for each number that is not finite."""
    by_window = [_finite_or_none(value) for value in line["landing_by_s"]]
    overall = {key: _finite_or_none(line[key]) for key in ("landing", "end") if key in line}
    return {**line, **overall, "landing_by_s": by_window}


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not _is_too_long(value)


def _is_too_long(value: float) -> bool:
    """Whether it is a whole number that no float holds."""
    return isinstance(value, int) and abs(value) > sys.float_info.max
