"""Laws of comparisons beside runs: the page says what they were made on, and where that may not be the runs' own."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from stages.report.basis import shown_path
from stages.report.page import make_page
from stages.system.storage.locations import map_locations
from tests.report.made_runs import make_run

study = pytest.importorskip("stages.ablation.study")
table = pytest.importorskip("stages.ablation.table")
pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'sollune[report]'")

OWN, OTHER = "f" * 64, "e" * 64
"""The recipe of the cache that `make_run` names, and another."""
MADE_WITH_ANOTHER = "These comparisons were made with another teacher, or from other data, than "
NOT_KNOWN = "It is not known whether these comparisons were made with the teacher and the data of "
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(inputs): a table of the studies `one` and `two`, which has these inputs of them."""

    def make(inputs: Mapping[str, Mapping[str, str]], files: Sequence[str] = ("configs/tiny.yaml",)) -> Path:
        studies = {
            name: study.Study.model_validate(
                {
                    "name": name,
                    "title": f"Question {name}",
                    "files": list(files),
                    "samples": 100,
                    "metrics": ["velocity error"],
                    "regimes": {"all": {"title": "everywhere"}},
                    "arms": {"control": {"title": "control"}, "arm": {"title": "arm"}},
                    "comparisons": [{"arms": ["arm"], "against": ["control"]}],
                }
            )
            for name in ("one", "two")
        }
        rows = [
            table.Row(name, "all", arm, seed, 100, "velocity error", 1.0 + 0.1 * seed, "s", "w")
            for name in studies
            for arm in ("control", "arm")
            for seed in range(3)
        ]
        table.write_table(tmp_path / "made" / "ablation.parquet", rows, studies, inputs)
        return tmp_path / "made" / "ablation.parquet"

    return make


def run_of(folder: Path, recipe: str) -> Path:
    """A made-up run whose cache has this recipe."""
    run = make_run(folder, checkpoints=(64,))
    origin = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps({**origin, "recipe_sha256": recipe}))
    return run


def parts_of(text: str) -> list[str]:
    """The comparison section: what stands before the studies, then each of them."""
    found = re.search(r'<section id="ablation".*?</section>', text, re.DOTALL)
    assert found is not None
    return re.split(r"<h3>Question \w+</h3>", found[0])


def doubts_of(part: str) -> list[str]:
    """The sentences on the runs of the page."""
    found = re.search(r'<div class="outcome unknown">(.*?)</div>', part, re.DOTALL)
    return re.findall(r"<p>(.*?)</p>", found[1]) if found else []


@pytest.mark.parametrize("with_runs", [False, True])
def test_the_table_its_files_and_its_hashes_are_named(tmp_path: Path, write: Write, with_runs: bool) -> None:
    files = ["configs/tiny.yaml", "/home/somebody/own/style.yaml"]
    file = write({"one": {"cache": OTHER, "distilled student": "d" * 64}}, files)
    runs = [make_run(tmp_path / "model/distill")] if with_runs else []
    head, one, two = parts_of(make_page(runs, file, None).text)
    assert "<code>made/ablation.parquet</code>" in head
    for part in (one, two):
        assert "configs/tiny.yaml, own/style.yaml" in part
        assert "somebody" not in part
    assert f"cache: recipe</th><td>{OTHER}" in one
    assert f"distilled student</th><td>{'d' * 64}" in one
    assert "cache: recipe</th><td>not in the table" in two
    assert "distilled student" not in two


def test_without_runs_there_is_nothing_to_doubt(write: Write) -> None:
    for inputs in ({}, {"one": {"cache": OTHER}}):
        assert [doubts_of(part) for part in parts_of(make_page([], write(inputs), None).text)] == [[], [], []]


def test_a_study_of_the_run_s_own_cache_is_not_doubted(tmp_path: Path, write: Write) -> None:
    text = make_page([run_of(tmp_path / "run", OWN)], write({"one": {"cache": OWN}, "two": {"cache": OWN}}), None).text
    assert [doubts_of(part) for part in parts_of(text)] == [[], [], []]


def test_each_study_is_doubted_by_its_own_cache(tmp_path: Path, write: Write) -> None:
    run = run_of(tmp_path / "run", OWN)
    head, one, two = parts_of(make_page([run], write({"one": {"cache": OTHER}, "two": {"cache": OWN}}), None).text)
    assert doubts_of(one) == [f"{MADE_WITH_ANOTHER}the run above, and say nothing certain about it."]
    assert doubts_of(head) == doubts_of(two) == []


@pytest.mark.parametrize("inputs", [{}, {"one": {"list of prompts": OWN}}])
def test_a_table_that_does_not_say_its_cache_is_doubted(
    tmp_path: Path, write: Write, inputs: Mapping[str, Mapping[str, str]]
) -> None:
    runs = [run_of(tmp_path / "a/run", OWN), run_of(tmp_path / "b/run", OTHER)]
    _, *studies = parts_of(make_page(runs, write(inputs), None).text)
    expected = [f"{NOT_KNOWN}the runs above, so they say nothing certain about them."]
    assert [doubts_of(part) for part in studies] == [expected, expected]


def test_of_several_runs_those_are_named_that_are_of_another_cache_or_of_none(tmp_path: Path, write: Write) -> None:
    recipes = [OWN, OTHER, *4 * ["d" * 64], ""]
    runs = [run_of(tmp_path / f"{number}/run", recipe) for number, recipe in enumerate(recipes)]
    _, one, two = parts_of(make_page(runs, write({"one": {"cache": OWN}, "two": {"cache": OTHER}}), None).text)
    for part, first in ((one, "1/run"), (two, "0/run")):
        assert doubts_of(part) == [
            f"{MADE_WITH_ANOTHER}{first}, 2/run, 3/run and 2 more, and say nothing certain about them.",
            f"{NOT_KNOWN}6/run, so they say nothing certain about it.",
        ]


def test_the_committed_table_says_on_what_it_was_run_or_that_it_does_not_know(tmp_path: Path) -> None:
    text = make_page([run_of(tmp_path / "run", OWN)], Path("docs/ablation.parquet"), None).text
    section = text[text.index('<section id="ablation"') :]
    assert "<code>docs/ablation.parquet</code>" in section
    assert section.count("What it was run on</caption>") == section.count('<div class="outcome unknown">') > 0
    assert "configs/tiny.yaml" in section


def test_paths_are_shown_without_the_folders_of_the_machine() -> None:
    assert shown_path(Path("docs/ablation.parquet")) == "docs/ablation.parquet"
    assert shown_path(Path("/home/somebody/runs/ablation.parquet")) == "runs/ablation.parquet"
    assert shown_path(Path("/ablation.parquet")) == "/ablation.parquet"
    assert shown_path(Path(map_locations("s3://bucket/runs/a.parquet"))) == "s3://bucket/runs/a.parquet"
