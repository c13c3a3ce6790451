"""Laws of the table and of the page that is made from it."""

from pathlib import Path

import pytest

from stages.ablation import command
from stages.ablation.page import render_page, verdict_sentence
from stages.ablation.study import Study, load_study
from stages.ablation.table import Row, read_studies, read_table, write_table
from stages.ablation.verdicts import compute_verdicts
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


@pytest.mark.parametrize("file", [file for file in STUDIES if file.stem != "adamw_32"], ids=lambda file: file.stem)
def test_the_studies_that_come_along_are_whole(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    assert all(path.is_file() for path in study.files)
    assert all(path.is_file() for arm in study.arms.values() for path in arm.files)
