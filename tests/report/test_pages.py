"""Laws of the page: it loads nothing, escapes everything, keeps to its bound, and says what the files say."""

import html
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stages import __main__ as cli
from stages.report.page import MAX_PAGE_BYTES, make_page
from stages.report.records import find_runs, read_run, run_names
from stages.report.summary import judge
from tests.report.made_runs import PROMPTS, gates, make_run, paired, write_lines, write_settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a distillation, two runs of few steps and a fine-tuning by classes."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    make_run(folder / "distill", evaluation={**paired(0.1), **gates(True, True)})
    make_run(folder / "fast/2", windows=2)
    make_run(folder / "fast/4", windows=4)
    make_run(folder / "classes", classes=True)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    return make_page([runs], None, None).text


def test_runs_come_in_the_order_of_their_training(runs: Path) -> None:
    found = find_runs([runs])
    assert [str(run.relative_to(runs)) for run in found] == ["distill", "fast/4", "fast/2", "classes"]
    assert find_runs([runs / "distill", runs]) == found
    assert len(set(run_names(found))) == 4


def test_the_page_loads_nothing(page: str) -> None:
    for attribute in re.findall(
        r"""(?:src|href|action|poster|data)\s*=\s*["']?([^"'\s>]*)""", page.split("<script>")[0]
    ):
        assert attribute.startswith(("data:", "#"))
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", page)


def test_what_users_write_is_escaped(page: str) -> None:
    assert "<script>alert" not in page
    assert "<b>ring" not in page
    assert html.escape(PROMPTS[2]).replace("&#x27;", "&#39;") in page
    data = re.search(r'id="pictures-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["runs"][0]["sheets"][0]["rows"] == list(PROMPTS)
    assert page.count("<script>") == 1


def test_names_of_folders_and_classes_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>" / "a&b", classes=True)
    (run / "per_class.csv").write_text('class,priority\n"<u>x</u>",top\n')
    text = make_page([run], None, None).text
    assert "<img src=x" not in text
    assert "<u>x" not in text
    assert "&lt;u&gt;x" in text


def test_every_section_is_there_and_headings_do_not_skip(page: str) -> None:
    for section in (
        "summary",
        "pictures",
        "curves",
        "bins",
        "blocks",
        "measured",
        "few-steps",
        "classes",
        "provenance",
    ):
        assert f'id="{section}"' in page
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_picture_and_chart_has_a_text(page: str) -> None:
    static = page.split("<script>")[0]
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", static))
    drawings = re.findall(r"<svg[^>]*>", static)
    assert drawings
    assert all("aria-label=" in tag or 'aria-hidden="true"' in tag for tag in drawings)


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    static = page.split("<script>")[0]
    ids = re.findall(r'\sid="([^"]+)"', static)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', static)) <= set(ids)


def test_hashes_and_landing_errors_stand_on_the_page(page: str) -> None:
    assert "1" * 64 in page
    assert "f" * 64 in page
    assert "Students of few steps" in page
    assert "0.0676" in page  # 0.5 / (1 + 6.4)


@pytest.mark.parametrize(
    ("evaluation", "windows", "complete", "level"),
    [
        (None, None, True, "unknown"),
        (None, None, False, "running"),
        (paired(0.1), None, False, "running"),
        (paired(0.2), None, True, "worked"),
        (paired(0.21), None, True, "partly"),
        (paired(0.51), None, True, "failed"),
        (gates(True, True), None, True, "worked"),
        ({**paired(0.9), **gates(True)}, None, True, "worked"),
        ({**paired(0.01), **gates(True, False)}, None, True, "failed"),
        (None, 2, True, "worked"),
    ],
)
def test_the_outcome_follows_the_stated_rule(
    tmp_path: Path, evaluation: Mapping[str, Any] | None, windows: int | None, complete: bool, level: str
) -> None:
    run = make_run(tmp_path / "run", evaluation=evaluation, windows=windows, complete=complete)
    assert judge(read_run(run, "run")).level == level


def test_what_was_measured_of_another_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluation={**paired(0.1), **gates(True), "samples": 320})
    record = read_run(run, "run")
    outcome = judge(record)
    assert outcome.level == "unknown"
    assert "320" in outcome.reasons[0]
    assert not record.gates


def test_seeds_of_the_same_settings_become_one_mean_with_an_interval(tmp_path: Path) -> None:
    alike = [make_run(tmp_path / f"seed{seed}" / "distill", seed=seed) for seed in range(3)]
    other = make_run(tmp_path / "other" / "distill", max_samples=9999)
    text = make_page([*alike, other], None, None).text
    assert "seed0/distill and 2 more seeds (mean, 95 %)" in text
    assert text.count('class="band"') == 2  # held-out error, and training loss
    assert "(mean, 95 %)" not in make_page([alike[0], other], None, None).text


def test_a_run_of_nothing_but_its_origin_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", complete=False)
    for path in sorted(run.rglob("*"), reverse=True):
        if path.name != "origin.json":
            path.rmdir() if path.is_dir() else path.unlink()
    text = make_page([run], None, None).text
    assert "It is still training." in text
    assert "Nothing is in its journal yet." in text


def test_a_cut_last_line_of_a_run_in_training_is_no_fault(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", complete=False)
    with open(run / "journal.jsonl", "a") as file:
        file.write('{"samples": 704, "lo')
    assert "640" in make_page([run], None, None).text


def test_only_the_page_of_a_run_in_training_renews_itself(tmp_path: Path) -> None:
    done, going = make_run(tmp_path / "done"), make_run(tmp_path / "going", complete=False)
    assert "data-reload-seconds" in make_page([done, going], None, 5.0).text.split("<script>")[0]
    for page in (make_page([done], None, 5.0), make_page([done, going], None, None)):
        assert "data-reload-seconds" not in page.text.split("<script>")[0]


def test_watching_ends_with_the_last_run_and_writes_what_came_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, rounds = make_run(tmp_path / "run", complete=False), tmp_path / "page.html", []

    def sleep(seconds: float) -> None:
        assert seconds == 2.0
        rounds.append(out.read_text())
        if len(rounds) == 1:
            (run / "journal.jsonl").write_text("no journal\n")  # a warning, and the page stays
        if len(rounds) == 2:
            write_lines(run, [{"samples": 640, "flow": 0.123}])
            (run / "COMPLETE").write_text("640\n")

    monkeypatch.setattr("time.sleep", sleep)
    assert cli.main(["report", str(run), "--out", str(out), "--watch", "2"]) == 0
    assert len(rounds) == 2
    assert rounds[0] == rounds[1]
    assert "data-reload-seconds" in rounds[0].split("<script>")[0]
    assert "0.123" in out.read_text()
    assert "data-reload-seconds" not in out.read_text().split("<script>")[0]


def test_a_long_journal_and_many_runs_keep_to_the_bound(tmp_path: Path) -> None:
    runs = []
    for seed in range(6):
        run = make_run(tmp_path / f"run{seed}", seed=seed, checkpoints=tuple(range(64, 641, 64)))
        write_settings(run, seed, 10**6)
        write_lines(run, [{"samples": n, "flow": 1 / n, "loss": 1.0, "lambdas": {f"b{i}": 1.0 * i for i in range(9)}}
                          for n in range(1, 2000)])  # fmt: skip
        runs.append(run)
    assert len(make_page(runs, None, None).text.encode()) < min(MAX_PAGE_BYTES, 8 << 20)


def test_nothing_of_the_machine_is_on_the_page(runs: Path, page: str) -> None:
    assert str(runs) not in page
    assert str(Path.home()) not in page or str(Path.home()) == "/"


def test_nothing_but_the_page_is_written(runs: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert cli.main(["report", str(runs), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
