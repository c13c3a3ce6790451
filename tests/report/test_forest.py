"""Laws of the forest plot: its rows are the verdicts of the table, and its marks lie where the numbers say."""

import math
import re
from pathlib import Path

import pytest

from stages.report.forest import Forest, read_ablation
from stages.report.page import make_page

study = pytest.importorskip("stages.ablation.study")
table = pytest.importorskip("stages.ablation.table")
pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'sollune[report]'")

VALUES = {"control": [1.0, 1.1, 0.9, 1.0], "better": [0.5, 0.61, 0.4, 0.49], "worse": [1.5, 1.61, 1.4, 1.49],
          "same": [1.1, 1.0, 1.0, 0.95]}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of one study in which an arm helps, one hurts, and one does neither."""
    path = tmp_path_factory.mktemp("table") / "ablation.parquet"
    one = study.Study.model_validate(
        {
            "name": "made-up",
            "title": "Made <up>",
            "files": ["configs/tiny.yaml"],
            "samples": 100,
            "seeds": 4,
            "metrics": ["velocity error"],
            "regimes": {"all": {"title": "everywhere"}},
            "arms": {name: {"title": f"{name} & co"} for name in VALUES},
            "comparisons": [{"arms": ["better", "worse", "same"], "against": ["control"]}],
        }
    )
    rows = [
        table.Row("made-up", "all", arm, seed, 100, "velocity error", value, "s", "w")
        for arm, values in VALUES.items()
        for seed, value in enumerate(values)
    ]
    table.write_table(path, rows, {"made-up": one})
    return path


@pytest.fixture(scope="module")
def forest(file: Path) -> Forest:
    (only,) = read_ablation(file).forests
    return only


def test_each_verdict_is_a_row_with_its_kind_and_its_sentence(forest: Forest) -> None:
    assert [(row.kind, row.verdict) for row in forest.rows] == [
        ("helps", "helps"), ("hurts", "hurts"), ("none", "no difference found")]  # fmt: skip
    assert forest.rows[0].difference == pytest.approx(-0.5)
    for row in forest.rows:
        assert row.name in f"{row.sentence} {row.name}"
        assert "4 seeds" in row.sentence
        assert "95 % interval" in row.sentence


def test_marks_are_in_order_within_the_frame(forest: Forest) -> None:
    for row in forest.rows:
        assert 0 <= forest.x(row.low) <= forest.x(row.difference) <= forest.x(row.high) <= 300
        assert (forest.x(row.low) <= forest.x(0.0) <= forest.x(row.high)) == (row.kind == "none")


def test_the_page_shows_all_of_them_escaped_even_without_a_run(file: Path) -> None:
    page = make_page([], file, None)
    assert page.complete
    assert page.text.count('class="mark"') == 3
    assert "Made &lt;up&gt;" in page.text
    assert "no difference was found" in page.text
    assert "<up>" not in page.text


@pytest.mark.parametrize("control", [[1e-320, 2e-320, 3e-320], [1e-200, 2e-200, 3e-200]])
def test_shares_that_no_scale_holds_have_no_mark(tmp_path: Path, control: list[float]) -> None:
    path = tmp_path / "ablation.parquet"
    one = study.Study.model_validate(
        {
            "name": "made-up",
            "title": "made up",
            "files": ["configs/tiny.yaml"],
            "samples": 100,
            "metrics": ["velocity error"],
            "regimes": {"all": {"title": "everywhere"}},
            "arms": {"control": {"title": "control"}, "arm": {"title": "arm"}},
            "comparisons": [{"arms": ["arm"], "against": ["control"]}],
        }
    )
    rows = [
        table.Row("made-up", "all", arm, seed, 100, "velocity error", value, "s", "w")
        for arm, values in {"control": control, "arm": [0.5, 0.7, 1.1]}.items()
        for seed, value in enumerate(values)
    ]
    table.write_table(path, rows, {"made-up": one})
    (only,) = read_ablation(path).forests
    assert all(0 <= only.x(tick) <= 300 for tick in only.ticks)
    marks = re.findall(r'(?:cx|x1|x2)="([^"]+)"', make_page([], path, None).text)
    assert all(math.isfinite(float(place)) for place in marks)
