"""Laws of the verdicts: Student's t, paired differences, the stated rule, and curves."""

import math
import random

import pytest

from stages.ablation.curves import mean_curve, samples_to_final_error, samples_to_reach
from stages.ablation.study import Study
from stages.ablation.table import Row
from stages.ablation.verdicts import Difference, Verdict, compute_verdicts, t_distribution, t_quantile, values_of
from stages.ablation.wording import cells_of, verdict_sentence

PUBLISHED = {
    (0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 3): 3.182, (0.975, 4): 2.776, (0.975, 7): 2.365, (0.975, 30): 2.042,
    (0.975, 120): 1.980, (0.8, 1): 1.376, (0.8, 2): 1.061, (0.8, 7): 0.896, (0.8, 30): 0.854, (0.995, 10): 3.169,
    (0.95, 5): 2.015, (0.9, 15): 1.341,
}  # fmt: skip
"""Of the usual printed tables."""
STUDY = Study.model_validate(
    {
        "name": "s",
        "title": "?",
        "files": ["configs/tiny.yaml"],
        "regimes": {"r": {"title": "r"}},
        "arms": {"A": {"title": "control"}, "D": {"title": "arm"}},
        "metrics": ["velocity error", "pictures right at 8 steps", "validation velocity error"],
        "seeds": 3,
        "comparisons": [{"arms": ["D"], "against": ["A"]}],
    }
)


def rows(metric: str, by_arm: dict[str, list[float]], samples: int = 10) -> list[Row]:
    return [
        Row("s", "r", arm, seed, samples, metric, value, "h", "w")
        for arm, values in by_arm.items()
        for seed, value in enumerate(values)
    ]


def verdict(metric: str, control: list[float], arm: list[float], study: Study = STUDY) -> Verdict:
    (one,) = compute_verdicts(rows(metric, {"A": control, "D": arm}), {"s": study})
    return one


@pytest.mark.parametrize(("place", "value"), PUBLISHED.items())
def test_quantiles_of_t_are_those_of_printed_tables(place: tuple[float, int], value: float) -> None:
    assert t_quantile(*place) == pytest.approx(value, abs=6e-4)
    assert t_quantile(1 - place[0], place[1]) == -t_quantile(*place)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 31])
def test_the_distribution_of_t_is_the_integral_of_its_density(degrees: int) -> None:
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    n, t = 4000, 1.7
    density = [scale * (1 + (t * (i + 0.5) / n) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(n)]
    assert t_distribution(t, degrees) == pytest.approx(0.5 + sum(density) * t / n, abs=1e-7)


def test_the_interval_is_the_textbook_one() -> None:
    difference = Difference.paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    error = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2 / 3)
    assert difference.mean == pytest.approx(7 / 3)
    assert difference.interval is not None
    assert difference.interval.high - difference.mean == pytest.approx(4.302653 * error)
    assert difference.interval.smallest_detectable == pytest.approx((4.302653 + 1.060660) * error)


def test_what_all_seeds_share_cancels_because_runs_are_paired() -> None:
    control = [5.0, 1.0, 9.0, 3.0]
    assert (
        verdict("velocity error", control, [value - 0.1 - 0.001 * i for i, value in enumerate(control)]).verdict
        == "helps"
    )


@pytest.mark.parametrize(
    ("metric", "better"), [("velocity error", -1), ("pictures right at 8 steps", 1), ("guidance error", -1)]
)
def test_less_error_and_more_right_pictures_help(metric: str, better: int) -> None:
    study = STUDY.model_copy(update={"metrics": (metric,)})
    gain = [1 + better * change for change in (0.10, 0.11, 0.12)]
    loss = [1 - better * change for change in (0.10, 0.11, 0.12)]
    assert verdict(metric, [1.0] * 3, gain, study).verdict == "helps"
    assert verdict(metric, [1.0] * 3, loss, study).verdict == "hurts"
    assert verdict(metric, [1.0] * 3, [0.9, 1.1, 1.0], study).verdict == "no difference found"


def test_the_rule_errs_once_in_twenty_and_finds_its_smallest_effect_four_times_in_five() -> None:
    generator, trials, n = random.Random(0), 3000, 8
    wrong = hits = 0
    true_effect = (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) / math.sqrt(n)  # at a deviation of 1
    for _ in range(trials):
        noise = [generator.gauss(0, 1) for _ in range(n)]
        wrong += Difference.paired(noise, [0.0] * n).outcome(True) != "no difference found"
        hits += Difference.paired([one + true_effect for one in noise], [0.0] * n).outcome(True) == "hurts"
    assert wrong / trials == pytest.approx(0.05, abs=0.015)
    assert hits / trials == pytest.approx(0.80, abs=0.05)


def test_only_seeds_of_both_arms_are_compared_and_the_others_are_counted() -> None:
    study = STUDY.model_copy(update={"seeds": 5})
    table = rows("velocity error", {"A": [1.0, 2.0, 3.0, 4.0], "D": [1.1, 2.11, 3.12]})
    (one,) = compute_verdicts(table, {"s": study})
    assert (one.seeds, one.control_mean, one.missing, one.broken) == (3, 2.0, 2, 0)
    for value in (math.nan, math.inf, -math.inf):
        broken = [*table, Row("s", "r", "D", 3, 10, "velocity error", value, "h", "w")]
        (one,) = compute_verdicts(broken, {"s": study})
        assert (one.seeds, one.missing, one.broken, one.verdict) == (3, 1, 1, "hurts")
        assert "3 seeds, 1 missing, 1 not finite" in verdict_sentence(one, study)
        assert cells_of(one).seeds == "3 (1 missing, 1 not finite)"
    assert compute_verdicts([row for row in table if row.arm == "A"], {"s": study}) == []


def test_an_arm_of_fewer_seeds_misses_none_of_the_control() -> None:
    arms = {**STUDY.arms, "D": STUDY.arms["D"].model_copy(update={"seeds": 3})}
    study = STUDY.model_copy(update={"arms": arms, "seeds": 8})
    table = rows("velocity error", {"A": [1.0 + 0.1 * i for i in range(8)], "D": [1.1, 1.3, 1.2]})
    (one,) = compute_verdicts(table, {"s": study})
    assert (one.seeds, one.missing) == (3, 0)


@pytest.mark.parametrize(
    ("metric", "control", "arm", "reason"),
    [
        ("velocity error", [0.5], [0.4], "too few seeds for an interval, which needs 3"),
        ("velocity error", [0.5, 0.6], [0.4, 0.3], "too few seeds for an interval, which needs 3"),
        ("velocity error", [0.5, 0.6], [0.4, 0.5], "the seeds do not differ: no interval can be given"),
        ("velocity error", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "the seeds do not differ: no interval can be given"),
        ("velocity error", [0.5] * 3, [0.4] * 3, "the seeds do not differ: no interval can be given"),
        ("velocity error", [0.5] * 8, [0.5] * 8, "every run has the same value: this figure cannot tell them apart"),
        ("velocity error", [0.0] * 3, [0.0] * 3, "every run has the same value: this figure cannot tell them apart"),
        ("velocity error", [1.0] * 3, [1.0] * 3, "every run has the same value: this figure cannot tell them apart"),
        (
            "pictures right at 8 steps",
            [1.0] * 3,
            [1.0] * 3,
            "all pictures are right in every run: this figure cannot tell them apart",
        ),
        ("velocity error", [0.5, 0.6, 0.7], [math.nan] * 3, "no seed has a finite value of both"),
    ],
)
def test_without_an_interval_there_is_no_verdict_but_a_reason(
    metric: str, control: list[float], arm: list[float], reason: str
) -> None:
    comparison = STUDY.comparisons[0].model_copy(update={"expected": "hurts"})
    study = STUDY.model_copy(update={"comparisons": (comparison,), "seeds": len(control)})
    one = verdict(metric, control, arm, study)
    assert (one.verdict, one.reason, one.passed) == ("no verdict", reason, None)
    cells, sentence = cells_of(one), verdict_sentence(one, study)
    assert (cells.interval, cells.smallest) == ("-", "-")
    assert cells.verdict == f"no verdict: {reason}"
    assert f"no verdict in {metric}: {reason}" in sentence
    assert "interval +" not in sentence
    assert "nan" not in f"{cells} {sentence}"


def test_a_spread_however_small_gives_an_interval_and_rounding_none() -> None:
    assert Difference.paired([0.5, 0.5, 0.5001], [0.4] * 3).interval is not None
    assert Difference.paired([0.1 + 0.2, 0.3, 0.7 - 0.4], [0.0] * 3).interval is None


def test_a_control_of_the_design_passes_only_as_expected() -> None:
    comparison = STUDY.comparisons[0].model_copy(update={"expected": "hurts"})
    study = STUDY.model_copy(update={"comparisons": (comparison,)})
    assert verdict("velocity error", [1.0] * 3, [1.2, 1.21, 1.22], study).passed
    assert verdict("velocity error", [1.0] * 3, [0.9, 1.1, 1.0], study).passed is False
    assert verdict("velocity error", [1.0] * 3, [0.9, 1.1, 1.0]).passed is None


def test_shares_are_of_the_controls_mean() -> None:
    one = verdict("velocity error", [2.0, 2.0, 2.0], [1.0, 2.0, 1.5])
    assert one.relative.mean == pytest.approx(-0.25)
    assert one.relative.interval is not None
    assert one.difference.interval is not None
    assert one.relative.interval.low == pytest.approx(one.difference.interval.low / 2)
    assert cells_of(one).difference == "-25.0%"


def test_differences_from_nothing_are_as_they_are() -> None:
    one = verdict("velocity error", [0.0] * 3, [1.0, 2.0, 1.5])
    assert not one.is_relative
    assert one.relative == one.difference
    assert cells_of(one).difference == "+1.5000"


def test_samples_to_an_error_lie_between_the_points_of_the_curve() -> None:
    curve = {100: 0.8, 200: 0.4, 300: 0.2}
    assert samples_to_reach(curve, 0.4) == 200
    assert samples_to_reach(curve, 0.3) == 250
    assert samples_to_reach(curve, 0.9) == 100
    assert samples_to_reach(curve, 0.1) is None
    table = [
        Row("s", "r", arm, 0, samples, "validation velocity error", value, "h", "w")
        for arm, of_arm in {"A": {100: 0.9, 200: 0.6}, "D": curve}.items()
        for samples, value in of_arm.items()
    ]
    reached = samples_to_final_error(values_of(table), "s", "r", "D", "A", "validation velocity error")
    assert reached is not None
    assert (reached.mean_samples, reached.seeds_reached) == (150, 1)


def test_values_that_are_not_finite_are_no_points_of_a_curve() -> None:
    assert samples_to_reach({100: math.nan, 200: 0.4, 300: math.inf, 400: 0.2}, 0.3) == 300
    assert samples_to_reach({100: math.nan}, 0.3) is None
    table = rows("validation velocity error", {"A": [0.5, math.nan], "D": [0.4, 0.4]})
    reached = samples_to_final_error(values_of(table), "s", "r", "D", "A", "validation velocity error")
    assert reached is not None
    assert reached.seeds == 1


def test_a_mean_curve_has_the_points_that_all_seeds_have_with_the_interval_of_the_mean() -> None:
    runs = {0: {100: 1.0, 200: 0.5}, 1: {100: 2.0, 200: math.nan}, 2: {100: 6.0, 200: 0.1, 300: 0.1}}
    (point,) = mean_curve(runs)
    assert (point.samples, point.mean, point.seeds) == (100, 3.0, 3)
    assert point.half_width == pytest.approx(4.302653 * math.sqrt(7 / 3))
    (two,) = mean_curve({0: {100: 1.0}, 1: {100: 2.0}})
    assert two.half_width is None
    assert mean_curve({}) == []


def test_a_comparison_after_some_samples_reads_the_curves_alone() -> None:
    comparison = STUDY.comparisons[0].model_copy(update={"samples": 5})
    study = STUDY.model_copy(update={"comparisons": (comparison,)})
    table = rows("validation velocity error", {"A": [1.0, 1.0], "D": [2.0, 2.1]}, samples=5)
    table += rows("validation velocity error", {"A": [1.0, 1.0], "D": [0.5, 0.6]}, samples=10)
    table += rows("velocity error", {"A": [1.0, 1.0], "D": [1.0, 1.0]}, samples=10)
    (one,) = compute_verdicts(table, {"s": study})
    assert (one.metric, one.samples, one.arm_values) == ("validation velocity error", 5, [2.0, 2.1])
