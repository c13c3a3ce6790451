"""Laws of the exam at checkpoints: what it is worth, what was lost, and what cannot be the best."""

import pytest

from stages.classes.monitor import ExamResult, StopConfig

WEIGHTS = {"stars": 0.75, "rings": 0.25}
BEFORE = {name: {"paired_error": 0.1, "all": 0.9} for name in ("stars", "rings", "(outside)")}


def found(stars: float, rings: float, outside: float) -> dict[str, dict[str, float]]:
    shares = {"stars": stars, "rings": rings, "(outside)": outside}
    return {name: {"paired_error": 0.2, "all": share} for name, share in shares.items()}


def test_the_score_is_the_share_of_wrong_pictures_by_weight_and_the_rest_has_none():
    assert ExamResult(found(1.0, 0.6, 0.0), BEFORE, WEIGHTS).score == pytest.approx(0.25 * 0.4)


def test_without_a_scorer_it_is_the_paired_error_and_nothing_is_lost():
    now = {"stars": {"paired_error": 0.2}, "rings": {"paired_error": 0.4}}
    watched = ExamResult(now, BEFORE, WEIGHTS)
    assert watched.score == pytest.approx(0.25)
    assert watched.metrics() == {"wrong": watched.score, "paired_error": {"stars": 0.2, "rings": 0.4}}


def test_what_is_lost_is_counted_in_points_against_the_distilled_student():
    told = ExamResult(found(1.0, 0.9, 0.6), BEFORE, WEIGHTS).metrics()
    assert told["lost"] == pytest.approx({"stars": -10.0, "rings": 0.0, "(outside)": 30.0})
    assert told["all"] == {"stars": 1.0, "rings": 0.9, "(outside)": 0.6}


def test_a_checkpoint_that_loses_too_much_has_a_value_and_no_score():
    watched = ExamResult(found(1.0, 1.0, 0.6), BEFORE, WEIGHTS, StopConfig(most_lost=20))
    assert watched.score is None
    assert watched.metrics()["wrong"] == 0
    assert ExamResult(found(1.0, 1.0, 0.6), BEFORE, WEIGHTS, StopConfig(most_lost=40)).score == 0
