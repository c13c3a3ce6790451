"""Laws of what `sollune ablate` refuses before it runs or writes anything."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.ablation import command
from stages.ablation.jobs import Job
from stages.ablation.plan import make_plan
from stages.ablation.study import load_study
from stages.ablation.table import Row, read_table, write_table
from stages.system.refusal import Refused

pyarrow = pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'sollune[report]'")
Write = Callable[..., Path]
ROW = Row("small", "only", "A", 0, 8, "velocity error", 0.5, "aa", "bb")

B_AGAINST_A = {"arms": ["B"], "against": ["A"], "metrics": ["validation velocity error"]}


def plan_jobs(file: Path, out: Path) -> Sequence[Job]:
    return make_plan(load_study(file), file, Path("tests/golden/data"), out, "cpu").jobs


@pytest.fixture
def table(tmp_path: Path, write_study: Write) -> Path:
    file = tmp_path / "t.parquet"
    study = load_study(write_study())
    write_table(file, [ROW], {study.name: study})
    return file


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--plan"], "--plan"), (["--quick"], "--quick"), (["--known", "other.parquet"], "--known"),
        (["--processes", "0"], "--processes"), (["--run", "r"], "--run"), (["--out", "o"], "--out"),
        (["--cluster", "foo"], "--cluster"), (["--device", "cpu"], "--device"), (["study.yaml"], "study.yaml"),
    ],
)  # fmt: skip
def test_options_of_runs_do_not_go_with_a_finished_table(table: Path, words: list[str], name: str) -> None:
    with pytest.raises(Refused, match=rf"^{name}: is for runs, and --table .*t\.parquet makes none - "):
        command.main([*words, "--table", str(table)])
    assert not table.with_suffix(".md").exists()


@pytest.mark.parametrize("place", ["known", "study", "table"])
def test_a_page_never_replaces_what_is_read(table: Path, write_study: Write, tmp_path: Path, place: str) -> None:
    file = write_study()
    page = {"known": table, "study": file, "table": tmp_path / "out/ablation.parquet"}[place]
    before = page.read_bytes() if page.exists() else None
    words = [str(file), "--known", str(table), "--page", str(page), "--out", str(tmp_path / "out")]
    with pytest.raises(Refused, match=r"--page: .* which the page would replace - name another"):
        command.main(words)
    assert (page.read_bytes() if page.exists() else None) == before


def test_a_page_that_cannot_be_written_is_refused_before_anything_runs(write_study: Write, tmp_path: Path) -> None:
    words = [str(write_study()), "--page", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(Refused, match="cannot be written"):
        command.main(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": [math.inf]}, "column seed is double, not int64"),
        ({"seed": [1.5]}, "column seed is double"),
        ({"seed": [-1]}, "column seed holds -1"),
        ({"study": [None]}, "column study "),
        ({"value": [None]}, "column value "),
        ({"value": ["x"]}, "column value is string, not float64"),
        ({"arm": [b"\xff"]}, "column arm is binary"),
    ],
)
def test_a_table_of_other_types_is_no_table(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    content = {name: [value] for name, value in vars(ROW).items()}
    file = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({**content, **changes}), file)
    with pytest.raises(Refused, match=match) as refusal:
        read_table(file)
    assert "\n" not in str(refusal.value)


def test_text_that_is_no_text_is_refused(tmp_path: Path) -> None:
    content = {name: [value] for name, value in vars(ROW).items()}
    buffers = pyarrow.array([b"\xff\xfe"]).buffers()
    broken = pyarrow.StringArray.from_buffers(1, buffers[1], buffers[2])
    file = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({**content, "arm": broken}), file)
    with pytest.raises(Refused, match=r"t\.parquet: no table of an ablation"):
        read_table(file)


def test_a_folder_and_a_figure_that_stands_twice_are_refused(tmp_path: Path, table: Path) -> None:
    with pytest.raises(Refused, match="is a folder, not a table"):
        read_table(tmp_path)
    write_table(table, [ROW, ROW])
    with pytest.raises(Refused, match="1 figures stand there more than once, the first of small/only/A seed 0"):
        read_table(table)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"options": {"train": {5: 3}}}, "train.5"),
        ({"evaluate": {"features": "m.f"}}, r"evaluate\.features: changes nothing that a study measures"),
        ({"evaluate": {"paired": {"sizes": ["64x64"]}}}, r"evaluate\.paired\.sizes: changes nothing"),
        ({"evaluate": {"coco": {"count": 8}}}, r"evaluate\.coco\.count: changes nothing"),
        ({"evaluate": {"lora-prompts": 9}}, r"evaluate\.lora_prompts: changes nothing"),
        (
            {"comparisons": [{**B_AGAINST_A, "samples": 6}]},
            r"samples 6: [AB] has no checkpoint there - name a multiple of its train\.\w+ \(4\), or 8",
        ),
    ],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(
    write_study: Write, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    file = write_study(**changes)
    with pytest.raises(Refused, match=match) as refusal:
        plan_jobs(file, tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_numbers_as_keys_of_a_quick_study_are_refused_too(write_study: Write, tmp_path: Path) -> None:
    quick = {"samples": 4, "arms": ["A", "B"], "regimes": ["only"], "options": {"train": {5: 3}}}
    file = write_study(quick=quick, regimes={"only": {"title": "o"}})
    with pytest.raises(Refused, match=r"train\.5|train: 5|5"):
        command.main([str(file), "--quick", "--plan", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("samples", [4, 8])
def test_samples_with_a_checkpoint_are_taken(write_study: Write, tmp_path: Path, samples: int) -> None:
    file = write_study(comparisons=[{**B_AGAINST_A, "samples": samples}])
    assert plan_jobs(file, tmp_path / "out")


def test_arms_that_never_run_together_are_not_compared(write_study: Write) -> None:
    regimes = {"one": {"title": "1"}, "two": {"title": "2"}}
    arms = {"A": {"title": "a", "regimes": ["one"]}, "B": {"title": "b", "regimes": ["two"]}, "C": {"title": "c"}}
    with pytest.raises(Refused, match="B and A never run together - leave it out"):
        load_study(write_study(regimes=regimes, arms=arms))
    comparisons = [{"arms": ["C"], "against": ["A"], "regimes": ["two"]}]
    with pytest.raises(Refused, match="C and A never run together in two"):
        load_study(write_study(regimes=regimes, arms=arms, comparisons=comparisons))
