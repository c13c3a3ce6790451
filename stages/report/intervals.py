"""Runs that differ in their seed alone, and the interval of their mean."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stages.ablation.curves import half_width
from stages.david.fusion import PLACEBOS
from stages.report.charts import Point, Series
from stages.report.records import RunRecord


@dataclass(frozen=True)
class Group:
    """Runs of the same settings."""

    name: str
    runs: Sequence[RunRecord]


def group_by_settings(runs: Sequence[RunRecord]) -> list[Group]:
    """The runs by all settings but their seeds, and by what else decided their weights, in the order of the first."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        # Without settings nothing says that two runs are alike.
        own = _seedless(run.history.settings) if run.history.settings else str(run.folder)
        key = json.dumps(_sorted([own, run.unlike_settings]), default=str)
        groups.setdefault(key, []).append(run)
    names = {key: own[0].name if len(own) == 1 else f"{own[0].name} and {len(own) - 1} more seeds"
             for key, own in groups.items()}  # fmt: skip
    return [Group(names[key], own) for key, own in groups.items()]


def _sorted(value: Any) -> Any:
    """The same with mappings as pairs in the order of their keys, which need not be texts."""
    if isinstance(value, Mapping):
        return sorted(([str(key), _sorted(inner)] for key, inner in value.items()), key=lambda pair: pair[0])
    return [_sorted(inner) for inner in value] if isinstance(value, list) else value


def _seedless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the seeds that runs of one arm of a study have of their own."""
    stripped: dict[str, Any] = copy.deepcopy(dict(settings))
    for part in (stripped, stripped.get("fast")):
        match part:
            case {"train": dict(train)}:
                train.pop("seed", None)
        match part:
            case {"lora": dict(lora)}:
                lora.pop("seed", None)
        match part:
            case {"david": {"fusion": dict(fusion)}} if fusion.get("formula") in PLACEBOS:
                fusion.pop("placebo_seed", None)
    return stripped


def mean_series(name: str, lines: Sequence[Sequence[Point]]) -> Series:
    """The mean of several lines where all have a value, with its 95 % interval where one can be given."""
    columns = [dict(line) for line in lines]
    shared = sorted(set.intersection(*(set(column) for column in columns)))
    points, band = list[Point](), list[tuple[float, float, float]]()
    for x in shared:
        values = [y for column in columns if (y := column[x]) is not None]
        if len(values) == len(columns):
            mean, half = fmean(values), half_width(values)
            points.append((x, mean))
            if half is not None:
                band.append((x, mean - half, mean + half))
    return Series(f"{name} (mean, 95 %)" if band else f"{name} (mean)", points, band)
