"""Broken input of the report: refused in one line that names the file, with nothing written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.report.made_runs import make_run, paired

Break: TypeAlias = Callable[[Path], Any]
GOOD_LINE = '{"samples": 64, "flow": 1.0}\n'


def nothing(_run: Path) -> None:
    """Only the command line is wrong."""


def text(file: str, content: str | bytes) -> Break:
    """Another content of a file of the run."""

    def change(run: Path) -> None:
        (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def gone(file: str) -> Break:
    return lambda run: (run / file).unlink()


def folder(file: str) -> Break:
    """A folder of that name."""

    def change(run: Path) -> None:
        (run / file).unlink()
        (run / file).mkdir()

    return change


def beside(name: str) -> Break:
    """A folder beside the run."""
    return lambda run: (run.parent / name).mkdir()


def pipe(file: str) -> Break:
    """A pipe of that name."""

    def change(run: Path) -> None:
        (run / file).unlink()
        os.mkfifo(run / file)

    return change


def table(name: str, target: str = "") -> Break:
    """A table of `sollune ablate` beside the run, or a link of this name to one."""

    def change(run: Path) -> None:
        shutil.copy("docs/ablation.parquet", run.parent / (target or name))
        if target:
            (run.parent / name).symlink_to(target)

    return change


def loop(name: str) -> Break:
    return lambda run: (run.parent / name).symlink_to(name)


TABLE: dict[str, tuple[Break, list[str], list[str]]] = {
    "no run": (gone("origin.json"), [], ["RUN", "origin.json is missing", "runs/tiny/distill"]),
    "no folder": (nothing, ["nowhere"], ["nowhere", "is no folder"]),
    "broken origin": (text("origin.json", "{"), [], ["origin.json", "cannot be read"]),
    "origin of another program": (text("origin.json", "[1]"), [], ["origin.json", "cannot be read"]),
    "cut line inside the journal": (
        text("journal.jsonl", GOOD_LINE + '{"samples": 1' + "\n" + GOOD_LINE), [], ["journal.jsonl:2"]),
    "journal of other lines": (text("journal.jsonl", "[]\n"), [], ["journal.jsonl:1", "no line of a journal"]),
    "journal that is no text": (text("journal.jsonl", b"\xff\xfe\n"), [], ["journal.jsonl:1"]),
    "journal that is a folder": (folder("journal.jsonl"), [], ["journal.jsonl", "cannot be read"]),
    "samples below zero": (text("journal.jsonl", '{"samples": -5}\n'), [], ["journal.jsonl", "-5 samples"]),
    "text for a loss": (text("journal.jsonl", '{"samples": 5, "loss": "low"}\n'), [], ["at 5 samples", "loss"]),
    "truth for a loss": (text("journal.jsonl", '{"samples": 5, "flow": true}\n'), [], ["at 5 samples", "flow"]),
    "list for lambdas": (text("journal.jsonl", '{"samples": 5, "lambdas": [1]}\n'), [], ["at 5 samples", "lambdas"]),
    "text in a list by time": (
        text("journal.jsonl", '{"samples": 5, "kind": "validation", "held_out_by_s": [1, "x"]}\n'), [],
        ["at 5 samples", "held_out_by_s.1"]),
    "number for an exam": (
        text("journal.jsonl", '{"samples": 5, "kind": "classes", "all": 3}\n'), [], ["at 5 samples", "all"]),
    "samples that no axis holds": (
        text("journal.jsonl", '{"samples": 4611686018427387903}\n'), [], ["journal.jsonl", "samples"]),
    "more samples than there are": (text("journal.jsonl", '{"samples": 1' + 300 * "0" + "}\n"), [], ["journal.jsonl"]),
    "text for a landing error": (
        text("journal.jsonl", '{"samples": 5, "kind": "validation", "end": "x"}\n'), [], ["at 5 samples", "end"]),
    "grid that is a link to nothing": (
        lambda run: (run / "grids/000000700.png").symlink_to("nowhere"), [], ["000000700.png", "no picture"]),
    "grid that is a folder": (folder("grids/000000640.png"), [], ["000000640.png", "no picture"]),
    "grid that is a pipe": (pipe("grids/000000640.png"), [], ["000000640.png", "no picture"]),
    "text for a score": (
        text("evaluation.json", '{"samples": 640, "paired": {"student": [{"steps": 4, "student": 1, "floor": 0, '
             '"ceiling": 1, "score": "good"}]}}'), [], ["evaluation.json", "paired.student.0.score"]),
    "text for the samples of an evaluation": (
        text("evaluation.json", '{"samples": "640"}'), [], ["evaluation.json", "samples"]),
    "number that no float holds": (
        text("evaluation.json", '{"samples": 640, "distances": 1' + 400 * "0" + "}"), [], ["evaluation.json"]),
    "verdict of a conversion that is none": (text("convert.json", '{"samples": []}'), [], ["convert.json", "samples"]),
    "grid that is no picture": (text("grids/000000640.png", "no"), [], ["000000640.png", "no picture"]),
    "evaluation that is no JSON": (text("evaluation.json", "{"), [], ["evaluation.json"]),
    "evaluation that is a list": (text("evaluation.json", "[]"), [], ["evaluation.json"]),
    "limits that are none": (
        text("evaluation.json", '{"samples": 640, "gates": [{"name": 1}]}'), [], ["evaluation.json", "gates"]),
    "settings that are none": (text("config.yaml", "a: ["), [], ["config.yaml"]),
    "settings that are a list": (text("config.yaml", "[]"), [], ["config.yaml"]),
    "table of classes that is none": (text("per_class.csv", "a,b\n1,2\n"), [], ["per_class.csv"]),
    "table of classes with short rows": (text("per_class.csv", "class,b\nx\n"), [], ["per_class.csv"]),
    "out inside the run": (nothing, ["--out", "RUN/page.html"], ["page.html", "inside the run"]),
    "out inside a folder of the run": (nothing, ["--out", "RUN/grids/page.html"], ["page.html", "inside the run"]),
    "out that is no page": (nothing, ["--out", "page.png"], ["page.png", "should end in .html"]),
    "out that is a folder": (beside("x.html"), ["--out", "x.html"], ["x.html", "is a folder"]),
    "watch of no number": (nothing, ["--watch", "often"], ["--watch", "often"]),
    "watch of no seconds": (nothing, ["--watch", "0"], ["--watch", "0"]),
    "watch for ever": (nothing, ["--watch", "inf"], ["--watch", "inf"]),
    "watch of nan": (nothing, ["--watch", "nan"], ["--watch", "nan"]),
    "out that is the table": (table("t.html"), ["--out", "t.html", "--table", "./t.html"], ["t.html", "is the table"]),
    "out that is a link to the table": (
        table("t.html", "a.parquet"), ["--out", "t.html", "--table", "a.parquet"], ["t.html", "is the table"]),
    "out that is a link to itself": (loop("x.html"), ["--out", "x.html", "--table", "none"], ["none"]),
    "table that is missing": (nothing, ["--table", "none.parquet"], ["none.parquet"]),
    "table that is none": (nothing, ["--table", "RUN/config.yaml"], ["config.yaml"]),
    "unknown option": (nothing, ["--wach", "5"], ["--wach"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_it_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    run = make_run(tmp_path / "RUN", evaluation=paired(0.1), checkpoints=(64, 640))
    spoil, words, named = TABLE[name]
    spoil(run)
    monkeypatch.chdir(tmp_path)
    refused(["report", "RUN", *([] if "--out" in words else ["--out", "page.html"]), *words], *named)


def test_no_run_at_all_is_refused(refused: Callable[..., str]) -> None:
    refused(["report"], "no run is named")


def test_a_missing_library_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    run = make_run(tmp_path / "run")
    refused(["report", str(run), "--out", str(tmp_path / "page.html")], "jinja2", "pip install 'sollune[report]'")
