"""The page: what its template needs, put together from runs, and the one text that holds it all."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.report import charts
from stages.report.curves import (
    block_chart,
    class_chart,
    class_flow_chart,
    lambda_chart,
    learning_charts,
    loss_chart,
    step_chart,
    time_chart,
)
from stages.report.intervals import group_by_settings
from stages.report.pictures import Album, Sheet, is_teacher, make_album, readable_title, teacher_of
from stages.report.records import RunRecord, find_runs, read_run, run_names
from stages.report.summary import RULE, Outcome, describe, figures, judge
from stages.report.tables import (
    class_table,
    evaluation_tables,
    few_steps_table,
    hash_table,
    overview_table,
    settings_text,
)
from stages.system.ending import installed_version
from stages.system.refusal import INVALID_CHARACTER, Refused

if TYPE_CHECKING:
    from stages.report.forest import Ablation

TEMPLATES = "templates"
HERO_ROWS = 3
MAX_PAGE_BYTES = 16 << 20
"""Of the whole page; its pictures take up to half of that."""
MAX_RUNS = 64
"""Runs of one page; further ones are left out, and it names them."""
MAX_DETAILED_RUNS = 16
"""Runs with charts of their own; the learning curves and tables hold all."""

ABLATION_DESCRIPTION = (
    "This page compares ways to train a text-to-image model (a student) to imitate another (its teacher): each was "
    "tried several times from different random seeds, and the differences are shown with how sure they are."
)


@dataclass(frozen=True)
class Page:
    """A page as text, whether all its runs are finished, and the names of those that it has no place for."""

    text: str
    complete: bool
    left_out: Sequence[str] = ()


def make_page(folders: Sequence[Path], table: Path | None, watch_seconds: float | None) -> Page:
    """The page of these runs; raises `Refused`, naming the file, for anything that cannot be read."""
    run_folders = find_runs(folders)
    names = run_names(run_folders)
    shown, left_out = list(zip(run_folders, names, strict=True))[:MAX_RUNS], names[MAX_RUNS:]
    runs = [read_run(folder, name) for folder, name in shown]
    ablation = _read_ablation(table, runs) if table else None
    complete = all(run.complete for run in runs)
    reload_seconds = None if complete else watch_seconds
    text = _render(runs, left_out, make_album([run.grids for run in runs]), ablation, reload_seconds)
    if (size := len(text.encode())) > MAX_PAGE_BYTES:
        raise Refused(f"page: {size >> 20} MiB, the most is {MAX_PAGE_BYTES >> 20} - name fewer runs on one page")
    return Page(text, complete, left_out)


def _read_ablation(table: Path, runs: Sequence[RunRecord]) -> "Ablation":
    """The verdicts of a table beside these runs; studies are imported for a table alone."""
    from stages.report.forest import read_ablation

    return read_ablation(table, runs)


def _render(
    runs: Sequence[RunRecord],
    left_out: Sequence[str],
    album: Album,
    ablation: "Ablation | None",
    reload_seconds: float | None,
) -> str:
    """The template filled in; everything in it is escaped."""
    environment = make_environment()
    script, style = (_template_text(name) for name in ("page.js", "page.css"))
    outcomes = [judge(run) for run in runs]
    detailed = runs[:MAX_DETAILED_RUNS]
    main = runs[0] if runs else None
    context: dict[str, Any] = {
        "title": _title(runs),
        "version": installed_version("sollune"),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "reload_seconds": reload_seconds,
        "script": script,
        "script_hash": _sha256(script),
        "style": style,
        "main": main,
        "description": describe(main) if main else ABLATION_DESCRIPTION,
        "outcome": outcomes[0] if main else None,
        "other_outcomes": _others(runs, outcomes),
        "rule": RULE,
        "figures": figures(main) if main else [],
        "hero": _hero(runs, album),
        "album": album,
        "viewer": _viewer(runs, album),
        "overview": overview_table(runs, [one.headline.rstrip(".") for one in outcomes]) if len(runs) > 1 else None,
        "left_out": left_out,
        "max_runs": MAX_RUNS,
        "hashes": [hash_table(run) for run in runs],
        "settings": [(run.name, text) for run in runs if (text := settings_text(run))],
        "learning": learning_charts(group_by_settings(runs)),
        "losses": _drawn([loss_chart(run, f"loss-{i}") for i, run in enumerate(detailed)]),
        "times": _drawn(
            [make(run, f"{key}-{i}") for i, run in enumerate(detailed)
             for key, make in (("time", time_chart), ("step", step_chart))]
        ),
        "blocks": _drawn(
            [make(run, f"{key}-{i}") for i, run in enumerate(detailed)
             for key, make in (("lambda", lambda_chart), ("block", block_chart))]
        ),
        "class_tables": [table for run in runs if (table := class_table(run)).rows],
        "class_charts": _drawn(
            [chart for i, run in enumerate(detailed) for chart in (
                class_chart(run, "all", f"right-{i}"),
                class_chart(run, "paired_error", f"paired-{i}"),
                class_flow_chart(run, f"class-flow-{i}"),
            )]
        ),
        "few_steps": few_steps_table(runs),
        "evaluations": [(run.name, tables) for run in runs if (tables := evaluation_tables(run))],
        "ablation": ablation,
        "hidden_runs": len(runs) - len(detailed),
    }  # fmt: skip
    rendered: str = environment.get_template("page.html").render(context)
    return visible(rendered)


def _title(runs: Sequence[RunRecord]) -> str:
    if not runs:
        return "comparison of recipes"
    return runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more"


def make_environment() -> Any:
    """jinja2 with everything escaped; raises `Refused` where it is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise Refused("report: jinja2 is not installed - pip install 'sollune[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = _json_in_html
    environment.globals.update(
        colour=charts.colour, dash=charts.dash, short=charts.short, readable_title=readable_title,
        chart_width=charts.WIDTH, chart_height=charts.HEIGHT, chart_left=charts.LEFT, chart_right=charts.RIGHT,
        chart_top=charts.TOP, chart_bottom=charts.BOTTOM,
    )  # fmt: skip
    return environment


def _template_text(name: str) -> str:
    return (files("stages.report") / TEMPLATES / name).read_text(encoding="utf-8")


def _json_in_html(value: Any) -> Any:
    """JSON that cannot end the element it stands in."""
    from markupsafe import Markup

    text = json.dumps(_visible_texts(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def visible(text: str) -> str:
    """The text with U+FFFD for each character that no page can hold, or that changes how others are shown."""
    return INVALID_CHARACTER.sub("\ufffd", text)


def _visible_texts(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _visible_texts(inner) for key, inner in value.items()}
    return [_visible_texts(inner) for inner in value] if isinstance(value, list | tuple) else value


def _sha256(text: str) -> str:
    """The hash by which the page permits its own script and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _drawn(made: Sequence[charts.Chart]) -> list[charts.Chart]:
    """The charts that have a line."""
    return [chart for chart in made if chart.lines]


def _others(runs: Sequence[RunRecord], outcomes: Sequence[Outcome]) -> list[tuple[str, Outcome]]:
    return [(run.name, outcome) for run, outcome in zip(runs[1:], outcomes[1:], strict=True)]


def _hero(runs: Sequence[RunRecord], album: Album) -> dict[str, Any] | None:
    """The newest grid of the first run that has one: a few rows, the teacher beside the student."""
    for run, sheets in zip(runs, album.sheets, strict=True):
        if sheets:
            sheet = sheets[-1]
            student = _own_column(sheet, run)
            teacher = teacher_of(sheet, student)
            rows = [
                {"prompt": prompt, "teacher": cells[teacher], "student": cells[student]}
                for prompt, cells in zip(sheet.rows, sheet.cells, strict=True)
            ]
            return {"run": run.name, "sheet": sheet, "rows": rows[:HERO_ROWS], "titles": (
                readable_title(sheet.columns[teacher]), readable_title(sheet.columns[student]))}  # fmt: skip
    return None


def _own_column(sheet: Sheet, run: RunRecord) -> int:
    """The column of the run's own student at as many steps as it is made for."""
    students = [number for number, title in enumerate(sheet.columns) if not is_teacher(title)]
    if not students:
        return 0
    # A distillation shows its student at many steps, then at few; any other run shows its own student last.
    own_is_last = run.origin.windows is not None or sheet.columns[students[-1]].endswith("finetuned")
    return students[-1 if own_is_last else 0]


def _viewer(runs: Sequence[RunRecord], album: Album) -> list[dict[str, Any]]:
    """The grids for the script, of each run that has any."""
    return [
        {
            "name": run.name,
            "sheets": [
                {
                    "samples": sheet.samples,
                    "rows": sheet.rows,
                    "columns": [readable_title(title) for title in sheet.columns],
                    "cells": sheet.cells,
                    "whole": sheet.is_whole,
                    "hidden": sheet.hidden_rows,
                    "teachers": [teacher_of(sheet, number) for number in range(len(sheet.columns))],
                    "student": _own_column(sheet, run),
                }
                for sheet in sheets
            ],
        }
        for run, sheets in zip(runs, album.sheets, strict=True)
        if sheets
    ]
