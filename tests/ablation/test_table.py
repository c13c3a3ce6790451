"""Laws of the table and of the page that is made from it."""

import json
from pathlib import Path

import pytest

from stages.ablation import command
from stages.ablation.jobs import read_job
from stages.ablation.page import render_page
from stages.ablation.plan import make_plan
from stages.ablation.quick import shortened
from stages.ablation.study import Study, load_study
from stages.ablation.table import Row, read_studies, read_table, write_table
from stages.ablation.verdicts import compute_verdicts
from stages.ablation.wording import verdict_sentence
from stages.system.refusal import Refused

COMMITTED = Path("docs/ablation.parquet")
STUDIES = sorted(Path("configs/ablation").glob("*.yaml"))


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(Path("configs/ablation/david.yaml"))


@pytest.fixture(scope="module")
def rows(study: Study) -> list[Row]:
    """Made-up figures of two regimes, three seeds."""
    return [
        Row(study.name, regime, arm, seed, samples, metric, 0.1 + 0.01 * seed + 0.003 * i + 1 / samples, "aa", "bb")
        for regime in ("grafted", "scratch")
        for i, arm in enumerate(("A", "C", "D", "H", "A2"))
        for seed in range(3)
        for samples in (100, 200)
        for metric in (*study.metrics, "validation velocity error")
    ]


def test_a_table_comes_back_as_it_was_written_in_order(tmp_path: Path, rows: list[Row], study: Study) -> None:
    file = tmp_path / "a.parquet"
    write_table(file, reversed(rows), {study.name: study})
    assert read_table(file) == sorted(rows)
    assert read_studies(file) == {study.name: study}
    write_table(file, [])
    assert (read_table(file), read_studies(file)) == ([], {})


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    with pytest.raises(Refused, match=r"a\.parquet: .* - "):
        read_table(file)
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(Refused, match=r"a\.parquet: .* - "):
        read_table(file)
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(pyarrow.table({"study": ["x"]}), file)
    with pytest.raises(Refused, match="column regime is missing"):
        read_table(file)


def test_the_page_holds_every_verdict_in_words(rows: list[Row], study: Study) -> None:
    page = render_page(rows, {study.name: study})
    verdicts = compute_verdicts(rows, {study.name: study})
    main = [v for v in verdicts if v.metric == study.metrics[0] and v.samples is None and v.expected is None]
    assert len(main) == 2 * 3  # D against A and C, C against A, in two regimes
    for verdict in main:
        assert verdict_sentence(verdict, study) in page
    assert "Controls of the design" in page
    assert page.count("| A2 against A |") == 2 * 2 * len(study.metrics)


def test_the_command_makes_the_page_of_a_table(tmp_path: Path, rows: list[Row], study: Study) -> None:
    write_table(tmp_path / "a.parquet", rows, {study.name: study})
    assert command.main(["--table", str(tmp_path / "a.parquet")]) == 0
    assert (tmp_path / "a.md").read_text() == render_page(rows, {study.name: study})


def test_the_committed_page_is_that_of_the_committed_table() -> None:
    if not COMMITTED.exists():
        pytest.skip(f"{COMMITTED} is not there: no study was run and kept yet")
    page = render_page(read_table(COMMITTED), read_studies(COMMITTED))
    assert COMMITTED.with_suffix(".md").read_text(encoding="utf-8") == page


def test_runs_of_the_committed_table_would_be_taken_for_todays(tmp_path: Path) -> None:
    """A setting that is new to every run changes all hashes, and finished runs would be measured again."""
    kept = {(row.study, row.regime, row.arm): row.settings for row in read_table(COMMITTED)}
    jobs = [
        job
        for study in read_studies(COMMITTED).values()
        for job in make_plan(study, COMMITTED, tmp_path, tmp_path, "cpu").jobs
        if (job.study, job.regime, job.arm) in kept
    ]
    assert {(job.study, job.regime, job.arm) for job in jobs} == kept.keys()
    assert all(job.settings_hash() == kept[job.study, job.regime, job.arm] for job in jobs)


def test_a_job_comes_back_as_it_was_stored_even_with_its_keys_in_another_order(tmp_path: Path) -> None:
    study = shortened(load_study(Path("configs/ablation/david.yaml")))
    (job, *_) = make_plan(study, Path("david.yaml"), tmp_path, tmp_path, "cpu").jobs
    content = json.loads(job.model_dump_json())
    assert set(content) == {
        "study", "regime", "arm", "seed", "home", "references", "distill", "evaluate", "guidance", "defects", "model",
        "inputs", "prompts",
    }  # fmt: skip
    file = tmp_path / "job.json"
    file.write_text(json.dumps(dict(reversed(content.items()))))
    assert read_job(file) == job


@pytest.mark.parametrize("file", [file for file in STUDIES if file.stem != "adamw_32"], ids=lambda file: file.stem)
def test_the_studies_that_come_along_are_whole(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    assert all(path.is_file() for path in study.files)
    assert all(path.is_file() for arm in study.arms.values() for path in arm.files)


@pytest.mark.parametrize(
    "file", [file for file in STUDIES if "\nquick:" in file.read_text()], ids=lambda file: file.stem
)
def test_a_table_of_a_shortened_study_can_be_read(file: Path, tmp_path: Path) -> None:
    study = shortened(load_study(file))
    write_table(tmp_path / "a.parquet", [], {study.name: study})
    assert read_studies(tmp_path / "a.parquet") == {study.name: study}
    assert study.samples
    assert "max_samples" not in study.model_dump_json()
