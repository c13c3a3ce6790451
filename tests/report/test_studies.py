"""Laws of a page about a study's folder: its runs are found, what is left out is named, and nothing else is taken."""

import json
from pathlib import Path

import pytest

from stages import __main__ as cli
from stages.report import page as page_module
from stages.report.page import make_page
from stages.report.records import find_runs
from tests.report.made_runs import make_run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `sollune ablate --out` leaves it: two arms of a distillation, and one of classes that reads a run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    base = make_run(folder / "distill", seed=7)
    for arm in ("A", "B"):
        for seed in range(2):
            _make_job(folder / "ablation/david/grafted" / arm / f"seed{seed}", "distill", arm, seed)
    home = folder / "ablation/classes/even/many/seed0"
    _make_job(home, "classes", "many", 0)
    (home / "distill").symlink_to(base, target_is_directory=True)
    return folder / "ablation"


def _make_job(home: Path, kind: str, arm: str, seed: int) -> None:
    make_run(home / kind, seed=seed, classes=kind == "classes", checkpoints=(640,))
    (home / "job.json").write_text(json.dumps({"study": "made-up", "regime": "all", "arm": arm}))


def test_runs_of_a_study_are_found_from_each_folder_above_them(out: Path) -> None:
    found = {
        place: [str(run.relative_to(out)) for run in find_runs([out / place])]
        for place in ("", "david", "david/grafted", "david/grafted/A", "david/grafted/A/seed1")
    }
    a, b = ([f"david/grafted/{arm}/seed{seed}/distill" for seed in range(2)] for arm in "AB")
    assert found == {
        "": [*a, *b, "classes/even/many/seed0/classes"],
        "david": [*a, *b],
        "david/grafted": [*a, *b],
        "david/grafted/A": a,
        "david/grafted/A/seed1": a[1:],
    }


def test_the_folder_above_a_study_is_the_page_of_its_own_runs_alone(out: Path) -> None:
    assert find_runs([out.parent]) == [out.parent / "distill"]


def test_a_linked_run_that_no_job_reads_is_found(tmp_path: Path) -> None:
    target = make_run(tmp_path / "disk/run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/distill").symlink_to(target, target_is_directory=True)
    assert find_runs([tmp_path / "runs"]) == [tmp_path / "runs/distill"]


def test_runs_named_by_numbers_and_by_words_have_an_order(tmp_path: Path) -> None:
    for name in ("12", "3", "words/more"):
        make_run(tmp_path / name, checkpoints=(64,))
    assert [str(run.relative_to(tmp_path)) for run in find_runs([tmp_path])] == ["12", "3", "words/more"]


def test_arms_of_a_study_have_a_mean_each(out: Path) -> None:
    text = make_page([out / "david"], None, None).text
    assert "A/seed0/distill and 1 more seeds (mean)" in text
    assert "B/seed0/distill and 1 more seeds (mean)" in text


def test_runs_beyond_the_most_of_a_page_are_named_on_it_and_on_the_terminal(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("page", "command"):
        monkeypatch.setattr(f"stages.report.{module}.MAX_RUNS", 3)
    file = tmp_path / "page.html"
    assert cli.main(["report", str(out), "--out", str(file)]) == 0
    text = file.read_text()
    left_out = ["B/seed1/distill", "many/seed0/classes"]
    assert "2 further runs are left out, since a page takes 3" in text
    shown, _, rest = text.partition('class="left-out"')
    for name in left_out:
        assert name not in shown
        assert f"<li>{name}</li>" in rest
    assert "B/seed0/distill" in shown
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "5 runs, a page takes 3: B/seed1/distill and 1 more left out" in warning
    monkeypatch.setattr(page_module, "MAX_RUNS", 5)
    assert 'class="left-out"' not in make_page([out], None, None).text
    assert not make_page([out], None, None).left_out


def test_a_page_takes_as_many_runs_as_its_documentation_says() -> None:
    assert f"A page takes up to {page_module.MAX_RUNS} runs" in Path("docs/report.md").read_text().replace("\n", " ")


@pytest.mark.parametrize("table", ["docs/ablation.parquet", "none.parquet"])
def test_watching_a_table_alone_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str
) -> None:
    out = tmp_path / "new/page.html"
    assert cli.main(["report", "--table", table, "--out", str(out), "--watch", "60"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--watch: 60: no run is named" in line
    assert " - name one, or leave --watch out" in line
    assert not list(tmp_path.iterdir())
