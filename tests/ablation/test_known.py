"""Laws of runs that another table has: they are not made again, and those of other settings or inputs are not taken."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.ablation import command
from stages.ablation.table import read_inputs, read_studies, read_table, write_table
from stages.system.refusal import Refused

Write = Callable[..., Path]
Ablate = Callable[..., Path]
ARMS = {
    "A": {"title": "velocity alone", "options": {"objective": {"block_weight": 0.0}}},
    "B": {"title": "more guidance", "options": {"objective": {"block_weight": 0.0, "guidance_weight": 0.7}}},
}


@pytest.fixture
def known(write_study: Write, ablate: Ablate, tmp_path: Path) -> Path:
    """The table of a small study; the folders of its runs are gone."""
    out = ablate(str(write_study(arms=ARMS)))
    table = tmp_path / "known.parquet"
    (out / "ablation.parquet").rename(table)
    shutil.rmtree(out)
    return table


def test_seeds_are_added_to_a_table_of_another_machine(
    known: Path, write_study: Write, ablate: Ablate, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_table(known)
    capsys.readouterr()
    out = ablate(str(write_study(arms=ARMS, seeds=3)), "--known", str(known))
    assert f"6 runs, 4 are done (4 of them in {known}), 2 to do" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("small/only/*/seed*")) == ["seed2", "seed2"]
    rows = read_table(out / "ablation.parquet")
    assert [row for row in rows if row.seed < 2] == before
    assert {(row.arm, row.seed) for row in rows} == {(arm, seed) for arm in "AB" for seed in range(3)}
    assert read_studies(out / "ablation.parquet")["small"].seeds == 3
    assert read_inputs(out / "ablation.parquet") == read_inputs(known)

    # A run that is here goes before the one of the table
    run = read_table(out / "ablation.parquet")
    ablate(str(write_study(arms=ARMS, seeds=3)), "--known", str(known))
    assert read_table(out / "ablation.parquet") == run


def test_runs_of_other_settings_are_made_again(known: Path, write_study: Write, ablate: Ablate) -> None:
    arms = {"A": ARMS["A"], "B": {**ARMS["B"], "options": {"objective": {"block_weight": 0.0, "uncond_weight": 0.5}}}}
    out = ablate(str(write_study(arms=arms)), "--known", str(known))
    assert {path.parent.name for path in out.glob("small/only/*/seed*")} == {"B"}
    rows, before = read_table(out / "ablation.parquet"), read_table(known)
    assert [row for row in rows if row.arm == "A"] == [row for row in before if row.arm == "A"]
    assert {row.settings for row in rows if row.arm == "B"}.isdisjoint({row.settings for row in before})


@pytest.mark.parametrize("name", ["cache", "list of prompts"])
def test_runs_of_another_cache_or_of_other_prompts_are_refused(
    known: Path, write_study: Write, ablate: Ablate, tmp_path: Path, name: str
) -> None:
    inputs = read_inputs(known)
    assert set(inputs["small"]) == {"cache", "list of prompts"}
    inputs["small"][name] = "0123456789abcdef"
    write_table(known, read_table(known), read_studies(known), inputs)
    with pytest.raises(
        Refused,
        match=rf"--known: .*known\.parquet: its runs of small are of another {name} \(0123456789ab, now \w{{12}}\) - ",
    ):
        ablate(str(write_study(arms=ARMS)), "--known", str(known))
    assert not (tmp_path / "out").exists()


def test_a_table_of_before_that_names_no_inputs_is_taken(known: Path, write_study: Write, ablate: Ablate) -> None:
    write_table(known, read_table(known), read_studies(known))
    assert read_inputs(known) == {}
    out = ablate(str(write_study(arms=ARMS)), "--known", str(known))
    assert not (out / "small").exists()
    assert read_table(out / "ablation.parquet") == read_table(known)
    assert set(read_inputs(out / "ablation.parquet")["small"]) == {"cache", "list of prompts"}


def test_the_inputs_of_other_studies_in_a_table_stay(write_study: Write, ablate: Ablate) -> None:
    out = ablate(str(write_study("one", arms=ARMS)))
    of_one = read_inputs(out / "ablation.parquet")["one"]
    ablate(str(write_study("two", arms=ARMS)))
    assert read_inputs(out / "ablation.parquet")["one"] == of_one
    assert list(read_studies(out / "ablation.parquet")) == ["one", "two"]


def test_broken_inputs_are_refused(known: Path) -> None:
    write_table(known, read_table(known), read_studies(known), {"small": ["cache"]})  # type: ignore[dict-item]
    with pytest.raises(Refused, match="what its runs read cannot be read"):
        read_inputs(known)


def test_a_table_that_is_not_there_is_refused(write_study: Write, tmp_path: Path) -> None:
    words = [str(write_study(arms=ARMS)), "--known", str(tmp_path / "no.parquet"), "--out", str(tmp_path / "out")]
    with pytest.raises(Refused, match=r"no\.parquet: cannot be read"):
        command.main([*words, "--run", "tests/golden/data", "--device", "cpu"])
