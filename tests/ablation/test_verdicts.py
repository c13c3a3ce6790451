"""Laws of the verdicts: Student's t, paired differences, the stated rule, and curves."""

import math
import random

import pytest

from stages.ablation.curves import samples_to_final_error, samples_to_reach
from stages.ablation.study import Study
from stages.ablation.table import Row
from stages.ablation.verdicts import Difference, Verdict, compute_verdicts, t_distribution, t_quantile, values_of

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
    assert difference.high - difference.mean == pytest.approx(4.302653 * error)
    assert difference.smallest_detectable == pytest.approx((4.302653 + 1.060660) * error)


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
    assert verdict(metric, [1.0] * 3, [1.0] * 3, study).verdict == "no difference found"


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


def test_only_seeds_of_both_arms_are_compared_and_one_is_no_verdict() -> None:
    table = rows("velocity error", {"A": [1.0, 2.0, 3.0], "D": [1.1, 2.1]})
    (one,) = compute_verdicts(table, {"s": STUDY})
    assert (one.seeds, one.control_mean) == (2, 1.5)
    assert compute_verdicts([row for row in table if row.seed == 0], {"s": STUDY}) == []
    broken = [*table, Row("s", "r", "D", 2, 10, "velocity error", math.nan, "h", "w")]
    assert compute_verdicts(broken, {"s": STUDY})[0].seeds == 2


def test_a_control_of_the_design_passes_only_as_expected() -> None:
    comparison = STUDY.comparisons[0].model_copy(update={"expected": "hurts"})
    study = STUDY.model_copy(update={"comparisons": (comparison,)})
    assert verdict("velocity error", [1.0] * 3, [1.2, 1.21, 1.22], study).passed
    assert verdict("velocity error", [1.0] * 3, [0.9, 1.1, 1.0], study).passed is False
    assert verdict("velocity error", [1.0] * 3, [0.9, 1.1, 1.0]).passed is None


def test_shares_are_of_the_controls_mean() -> None:
    one = verdict("velocity error", [2.0, 2.0], [1.0, 2.0])
    assert one.relative[0] == pytest.approx(-0.25)
    assert all(map(math.isnan, verdict("velocity error", [0.0, 0.0], [1.0, 2.0]).relative))


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


def test_a_comparison_after_some_samples_reads_the_curves_alone() -> None:
    comparison = STUDY.comparisons[0].model_copy(update={"samples": 5})
    study = STUDY.model_copy(update={"comparisons": (comparison,)})
    table = rows("validation velocity error", {"A": [1.0, 1.0], "D": [2.0, 2.1]}, samples=5)
    table += rows("validation velocity error", {"A": [1.0, 1.0], "D": [0.5, 0.6]}, samples=10)
    table += rows("velocity error", {"A": [1.0, 1.0], "D": [1.0, 1.0]}, samples=10)
    (one,) = compute_verdicts(table, {"s": study})
    assert (one.metric, one.samples, one.arm_mean) == ("validation velocity error", 5, 2.05)
