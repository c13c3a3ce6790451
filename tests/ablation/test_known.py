"""Laws of runs that another table has: they are not made again, and those of other settings or inputs are not taken."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stages.ablation import command, scheduler
from stages.ablation.jobs import Job
from stages.ablation.known import known_rows
from stages.ablation.measuring import Measured
from stages.ablation.plan import make_plan
from stages.ablation.study import load_study
from stages.ablation.table import read_inputs, read_studies, read_table, write_table
from stages.system.refusal import Refused

GOLDEN = Path("tests/golden/data")

Write = Callable[..., Path]
Ablate = Callable[..., Path]
ARMS = {
    "A": {"title": "velocity alone", "options": {"objective": {"block_weight": 0.0}}},
    "B": {"title": "more guidance", "options": {"objective": {"block_weight": 0.0, "guidance_weight": 0.7}}},
}


def pretend(
    jobs: Sequence[Job], cache_run: Path, _at_once: int, on_finished: Callable[[Job], None], _start: object
) -> None:
    """The scheduler with figures that follow from the seed, where a real run would take seconds."""
    for job in jobs:
        scheduler.prepare(job, cache_run)
        figures = {"paired error at 2 steps": 0.5 + job.seed, "velocity error": 0.25 + job.seed}
        measured = Measured(job.settings_hash(), f"weights{job.seed}", job.samples, figures, job.prompts)
        (job.home / "measured.json").write_text(json.dumps(vars(measured)))
        on_finished(job)


@pytest.fixture
def ablate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ablate:
    """Run the command on the golden cache without training; returns the folder of the runs."""
    monkeypatch.setattr(scheduler, "run_jobs", pretend)

    def run(*words: str) -> Path:
        out = tmp_path / "out"
        assert command.main([*words, "--run", str(GOLDEN), "--out", str(out), "--device", "cpu"]) == 0
        return out

    return run


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
        match=rf"known\.parquet: its runs of small are of another {name} \(0123456789ab, now \w{{12}}\) - ",
    ):
        ablate(str(write_study(arms=ARMS)), "--known", str(known))
    assert not (tmp_path / "out").exists()


def test_a_table_of_before_that_names_no_inputs_is_taken(known: Path, write_study: Write, ablate: Ablate) -> None:
    write_table(known, read_table(known), read_studies(known))
    assert read_inputs(known) == {}
    out = ablate(str(write_study(arms=ARMS)), "--known", str(known))
    assert not (out / "small").exists()
    assert read_table(out / "ablation.parquet") == read_table(known)
    assert read_inputs(out / "ablation.parquet") == {}  # nor does the new one claim to know


def test_what_is_known_of_the_inputs_stays_known_without_a_cache(
    known: Path, write_study: Write, tmp_path: Path
) -> None:
    inputs = read_inputs(known)
    out, run = tmp_path / "out", tmp_path / "nothing"
    words = [str(write_study(arms=ARMS)), "--known", str(known), "--run", str(run), "--out", str(out)]
    assert command.main([*words, "--device", "cpu"]) == 0
    assert read_inputs(out / "ablation.parquet") == inputs
    assert not run.exists()


def test_rows_of_known_runs_stay_in_the_table_until_these_are_made(
    known: Path, write_study: Write, ablate: Ablate, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_study(arms=ARMS))
    out = ablate(file, "--known", str(known))
    before = read_table(out / "ablation.parquet")

    monkeypatch.setattr(scheduler, "run_jobs", lambda jobs, *others: pretend(jobs[:1], *others))
    ablate(file)  # without --known
    assert [path.parent.name for path in out.glob("small/only/*/seed*")] == ["A"]
    rows = read_table(out / "ablation.parquet")
    assert [row for row in rows if (row.arm, row.seed) != ("A", 0)] == [
        row for row in before if (row.arm, row.seed) != ("A", 0)
    ]
    assert len(rows) == len(before)


def test_a_run_without_its_figures_at_the_end_is_not_known(known: Path, write_study: Write, tmp_path: Path) -> None:
    rows = read_table(known)
    metrics = {"small": load_study(write_study(arms=ARMS)).metrics}
    file = write_study(arms=ARMS)
    jobs = make_plan(load_study(file), file, GOLDEN, tmp_path / "out", "cpu").jobs
    assert len(known_rows(jobs, known, metrics).rows) == 4
    curve = [replace(row, metric="validation velocity error") for row in rows if row.metric == "velocity error"]
    curves = [row for row in rows if row.arm == "A"] + [row for row in curve if row.arm == "B"]
    early = [row if row.arm == "A" else replace(row, samples=4) for row in rows]
    one_figure = [row for row in rows if row.arm == "A" or row.metric == "velocity error"]
    for kept in (curves, early, one_figure):
        write_table(known, kept, read_studies(known))
        assert {label.split()[0] for label in known_rows(jobs, known, metrics).rows} == {"small/only/A"}


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
