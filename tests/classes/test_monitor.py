"""Laws of the exam at checkpoints: its score, the points lost, and which checkpoint cannot be the best."""

import pytest

from stages.classes.monitor import ExamResult, StopConfig

WEIGHTS = {"stars": 0.75, "rings": 0.25}
BEFORE = {name: {"paired_error": 0.1, "all": 0.9} for name in ("stars", "rings", "(outside)")}


def metrics_by_class(stars: float, rings: float, outside: float) -> dict[str, dict[str, float]]:
    shares = {"stars": stars, "rings": rings, "(outside)": outside}
    return {name: {"paired_error": 0.2, "all": share} for name, share in shares.items()}


def test_the_score_is_the_share_of_wrong_pictures_by_weight_and_the_rest_has_none():
    assert ExamResult(metrics_by_class(1.0, 0.6, 0.0), BEFORE, WEIGHTS).score == pytest.approx(0.25 * 0.4)


def test_without_a_scorer_it_is_the_paired_error_and_nothing_is_lost():
    now = {"stars": {"paired_error": 0.2}, "rings": {"paired_error": 0.4}}
    result = ExamResult(now, BEFORE, WEIGHTS)
    assert result.score == pytest.approx(0.25)
    assert result.metrics() == {"wrong": result.score, "paired_error": {"stars": 0.2, "rings": 0.4}}


def test_losses_are_counted_in_points_against_the_distilled_student():
    metrics = ExamResult(metrics_by_class(1.0, 0.9, 0.6), BEFORE, WEIGHTS).metrics()
    assert metrics["lost"] == pytest.approx({"stars": -10.0, "rings": 0.0, "(outside)": 30.0})
    assert metrics["all"] == {"stars": 1.0, "rings": 0.9, "(outside)": 0.6}


def test_a_checkpoint_that_loses_too_much_has_a_value_and_no_score():
    result = ExamResult(metrics_by_class(1.0, 1.0, 0.6), BEFORE, WEIGHTS, StopConfig(most_lost=20))
    assert result.score is None
    assert result.metrics()["wrong"] == 0
    assert ExamResult(metrics_by_class(1.0, 1.0, 0.6), BEFORE, WEIGHTS, StopConfig(most_lost=40)).score == 0
