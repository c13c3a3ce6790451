"""Laws of `benchmarks.few_steps`: what is compared, kept and refused, and a small measurement as a whole."""

import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import few_steps
from benchmarks.few_steps_models import (
    Measurement,
    Model,
    all_right,
    distinct_sentences,
    judge,
    make_inputs,
    open_ended,
    open_subjects,
)
from benchmarks.few_steps_results import marks, mean_interval, phase_seconds, share_interval
from stages.evaluate.distances.estimators import frechet_floor
from stages.evaluate.metrics import shows_everything
from stages.nets.run_folder import Origin
from stages.prompts import GrammarSource, split_of
from stages.sampling.sampler import Sampler
from stages.system.refusal import Refused
from stages.tiny.score import load_classifier, score
from stages.tiny.world import ATTRIBUTES, parse_attributes
from tests.few_steps import make_fast_run

GOLDEN = Path("tests/golden/data")
"""A run with its teacher, of 8 channels."""
SOURCE = GrammarSource(source="grammar", grammar=Path("stages/tiny/grammar.yaml"))


def make_run(folder: Path, windows: tuple[int, ...] = (4, 1)) -> Path:
    folder.mkdir()
    shutil.copytree(GOLDEN / "distill", folder / "distill")
    shutil.copy(GOLDEN / "cache.yaml", folder)
    for n in windows:
        make_fast_run(folder / "fast" / str(n), n, teacher=GOLDEN / "teacher")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


def test_sentences_are_distinct_and_no_training_saw_them() -> None:
    texts = distinct_sentences(SOURCE, 5, 120)
    assert len(set(texts)) == 120
    assert {split_of(text) for text in texts} == {"validation"}
    assert texts[:40] == distinct_sentences(SOURCE, 5, 40)


def test_more_sentences_than_the_source_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.few_steps_models.MAX_PROMPTS_READ", 4)
    with pytest.raises(Refused, match=r"^--prompts: 400: the source has \d+ distinct sentences - ask for no more$"):
        distinct_sentences(SOURCE, 5, 400)


def test_open_sentences_leave_something_unsaid_and_those_that_leave_most_come_first() -> None:
    texts = open_ended(distinct_sentences(SOURCE, 5, 90), 30)
    unsaid = [len(ATTRIBUTES) - len(parse_attributes(text)) for text in texts]
    assert unsaid == sorted(unsaid, reverse=True)
    assert min(unsaid) > 0
    assert open_ended(["a small red star at the left on a blue background"], 3) == []


def test_the_judge_answers_as_the_scorer_does() -> None:
    texts = distinct_sentences(SOURCE, 5, 40)
    pictures = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    answers, features = judge(pictures)
    assert torch.equal(answers, load_classifier().predict(pictures * 2 - 1))
    assert features.shape == (40, 128)
    assert torch.equal(all_right(texts, answers), shows_everything(score(texts, pictures)))


def test_a_picture_is_right_where_each_named_attribute_is_and_others_do_not_matter() -> None:
    text = "a small red star"
    answers = torch.tensor([[0, 0, 6, 0, 0], [0, 0, 6, 4, 3], [1, 0, 6, 0, 0], [0, 1, 6, 0, 0], [0, 0, 7, 0, 0]])
    assert all_right([text] * 5, answers).tolist() == [True, True, False, False, False]


def test_wilsons_interval_is_the_published_one_and_never_empty() -> None:
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = share_interval(1.0, 500)
    assert high == pytest.approx(1)
    assert low == pytest.approx(500 / (500 + 1.959964**2))


def test_the_interval_of_a_mean_counts_seeds_as_well_as_prompts() -> None:
    values = torch.rand(1, 200, generator=torch.Generator().manual_seed(0)).double()
    low, high = mean_interval(values)
    expected = 2 * 1.96 * float(values.std()) / math.sqrt(200)
    assert high - low == pytest.approx(expected, rel=0.1)
    same, different = values.repeat(3, 1), values + torch.tensor([[0.0], [0.3], [0.6]])
    assert mean_interval(same) == pytest.approx((low, high), abs=0.02)
    wide_low, wide_high = mean_interval(different)
    assert wide_high - wide_low > 3 * expected


def test_what_was_sampled_is_kept_and_anything_that_changes_it_samples_again(run: Path, tmp_path: Path) -> None:
    subjects, calls = open_subjects([run]), 0
    fast = subjects.runs[0].fast[4]

    def guided(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return fast.field.velocity(x, s, cond, uncond, w)

    model = replace(fast, field=replace(fast.field, guided=guided))
    texts = distinct_sentences(SOURCE, 5, 3)
    inputs, measure = make_inputs(subjects.teacher, texts, 5, "own"), Measurement(subjects.teacher, tmp_path)
    first = measure.pictures(model, inputs, Sampler(steps=4))
    assert calls == 4
    again = measure.pictures(model, inputs, Sampler(steps=4))
    assert calls == 4
    assert torch.equal(first.latents, again.latents)
    others: list[tuple[Model, str, list[str], float]] = [
        (model, "other", texts, 5.0),
        (model, "own", texts[:2], 5.0),
        (model, "own", texts, 4.0),
        (replace(model, identity={"weights": "other"}), "own", texts, 5.0),
    ]
    for turn, (one, noise, some, w) in enumerate(others, start=2):
        measure.pictures(one, make_inputs(subjects.teacher, some, 5, noise), Sampler(steps=4, guidance=w))
        assert calls == 4 * turn


def test_noises_of_one_sentence_differ_and_lists_of_other_names_share_none(run: Path) -> None:
    teacher = open_subjects([run]).teacher
    one, other = (make_inputs(teacher, ["a red star", "a blue ring"], 5, name, 3) for name in ("own", "other"))
    assert one.texts == ["a red star"] * 3 + ["a blue ring"] * 3
    assert torch.equal(one.cond[0], one.cond[2])
    assert not torch.equal(one.cond[0], one.cond[3])
    assert len(torch.cat([one.noise, other.noise]).unique(dim=0)) == 12


def test_an_unfinished_student_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", (4, 2))
    (run / "fast" / "2" / "COMPLETE").unlink()
    assert list(open_subjects([run]).runs[0].fast) == [4]
    assert f"{run}/fast/2: is not finished, left out" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="stands there more than once"):
        open_subjects([run, run.parent / "." / run.name])
    other = make_run(tmp_path / "other", (2,))
    renamed = (other / "fast" / "2").rename(other / "fast" / "1")
    with pytest.raises(Refused, match=r"fast/1: its student has 2 windows - rename it"):
        open_subjects([other])
    renamed.rename(other / "fast" / "2")
    replace(Origin.open(other / "distill"), tail="faithful").save(other / "distill")
    with pytest.raises(Refused, match="has another teacher than"):
        open_subjects([run, other])
    (other / "distill" / "COMPLETE").unlink()
    with pytest.raises(Refused, match="is not finished"):
        open_subjects([other])
    with pytest.raises(Refused, match="no run lies here"):
        open_subjects([tmp_path])


def test_the_seconds_of_a_training_are_those_of_its_windows_and_validations(tmp_path: Path) -> None:
    lines = [{"samples": 8, "window_seconds": 2.5}, {"samples": 8, "kind": "validation", "seconds": 1.25}]
    assert phase_seconds(tmp_path) is None
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert phase_seconds(tmp_path) == 3.75


def test_a_mark_is_met_from_its_value_on() -> None:
    row = {"right": {"mean": 0.985}, "error": {"mean": 0.061}}
    measured = {"guidance": {"5": {"rows": {"4 windows, 4 steps": row}}}}
    assert [one["met"] for one in marks(measured).values()] == [True, False]


def test_two_seeds_are_measured_from_end_to_end_and_a_second_time_alike(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "other", (4,))
    for name, value in (("REFERENCE_STEPS", 3), ("MANY", 2), ("STEPS", (1, 2)), ("TIMED_ROUNDS", 1)):
        monkeypatch.setattr(few_steps, name, value)
    monkeypatch.setattr("benchmarks.few_steps_results.frechet_floor", partial(frechet_floor, swaps=3))
    monkeypatch.setattr(few_steps, "SHIFTS", (1.0, 3.0))
    monkeypatch.setattr(few_steps, "SHIFTED_STEPS", (2,))
    monkeypatch.setattr(few_steps, "TIMED_PICTURES", 2)
    out = tmp_path / "out"
    words = [str(run), str(other), str(out), "--prompts", "6", "--guidance", "5", "--open-prompts", "2"]
    monkeypatch.setattr(sys, "argv", ["few_steps", *words, "--noises", "3"])
    few_steps.main()
    results = json.loads((out / "few_steps.json").read_text())
    rows = results["guidance"]["5"]["rows"]
    assert {name: len(row["right"]["runs"]) for name, row in rows.items()} == {
        "teacher, 1 steps": 1,
        "teacher, 2 steps": 1,
        "4 windows, 4 steps": 2,
        "1 windows, 1 step": 1,
        "student, 1 steps": 2,
        "student, 2 steps": 2,
    }
    assert rows["teacher, 1 steps"]["error"]["mean"] > rows["teacher, 2 steps"]["error"]["mean"] > 0
    assert {name: one["calls"] for name, one in results["seconds"].items()} == {
        "teacher, 2 steps": 4,
        "student, 2 steps": 4,
        "4 windows, 4 steps": 4,
        "1 windows, 1 step": 1,
    }
    assert len(results["shifts"]) == 4
    assert "| 4 windows, 4 steps |" in capsys.readouterr().out
    pictures = {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    few_steps.main()
    assert pictures == {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    again = json.loads((out / "few_steps.json").read_text())
    assert {**again, "seconds": None} == {**results, "seconds": None}
