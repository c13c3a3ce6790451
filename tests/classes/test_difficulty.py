"""Laws of the difficulty of classes: the probe, pooling of classes measured a few times, and the priority."""

from collections.abc import Mapping, Sequence
from itertools import count

import pytest
import torch

from stages.classes.cached import CacheErrors
from stages.classes.difficulty import (
    ClassMeans,
    Estimate,
    PooledMeans,
    ProbeErrors,
    assign_priority,
    class_means,
    pool_means,
    probe_classes,
    rank_classes,
    relative_error_shares,
)
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.sampler import Sampler


def simulated(classes: int, tau: float, noise: float, seed: int = 0) -> tuple[torch.Tensor, ClassMeans, ClassMeans]:
    """True values, a covariate that explains half of their variance, and measurements."""
    generator = torch.Generator().manual_seed(seed)
    covariate, rest, errors = torch.randn(3, classes, generator=generator, dtype=torch.float64)
    theta = 2 + tau * covariate + tau * rest
    return (
        theta,
        ClassMeans(covariate, torch.zeros_like(theta)),
        ClassMeans(theta + noise * errors, torch.full_like(theta, noise)),
    )


def mean_squared_error(means: PooledMeans, theta: torch.Tensor) -> float:
    return float((means.mean - theta).square().mean())


def test_the_error_of_a_mean_comes_from_one_deviation_for_all_classes() -> None:
    means = class_means([torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0, 5.0, 5.0])])
    assert means.mean.tolist() == [2, 5]
    within = 2 / (6 - 2)
    assert means.standard_error.tolist() == pytest.approx([(within / 2) ** 0.5, (within / 4) ** 0.5])


def test_where_noise_explains_all_differences_every_class_gets_the_common_mean() -> None:
    means = pool_means(ClassMeans(torch.tensor([1.0, 1.1, 0.9, 1.0]), torch.full((4,), 0.5)), [])
    assert means.tau == 0
    assert means.mean.tolist() == pytest.approx([1.0] * 4)


def test_a_class_that_was_measured_exactly_keeps_its_own_mean() -> None:
    theta, covariate, _ = simulated(20, 1.0, 0.0)
    means = pool_means(ClassMeans(theta, torch.full_like(theta, 1e-4)), [covariate])
    assert means.mean.tolist() == pytest.approx(theta.tolist(), abs=1e-3)
    assert means.standard_error.max() < 2e-4


def test_the_deviation_of_the_classes_is_recovered() -> None:
    _, covariate, measured = simulated(4000, 0.5, 0.8)
    assert pool_means(measured, [covariate]).tau == pytest.approx(0.5, rel=0.1)
    assert pool_means(measured, []).tau == pytest.approx(0.5 * 2**0.5, rel=0.1)


def test_pooling_is_nearer_to_the_truth_than_the_means_and_a_covariate_nearer_still() -> None:
    theta, covariate, measured = simulated(4000, 0.5, 0.8)
    alone, helped = pool_means(measured, []), pool_means(measured, [covariate])
    assert (
        mean_squared_error(helped, theta)
        < mean_squared_error(alone, theta)
        < float((measured.mean - theta).square().mean())
    )


def test_the_stated_error_is_the_actual_one() -> None:
    theta, covariate, measured = simulated(4000, 0.5, 0.8)
    means = pool_means(measured, [covariate])
    assert mean_squared_error(means, theta) == pytest.approx(float(means.standard_error.square().mean()), rel=0.1)


def test_few_classes_allow_no_covariate() -> None:
    _, covariate, measured = simulated(9, 1.0, 0.3)
    assert torch.equal(pool_means(measured, [covariate]).mean, pool_means(measured, []).mean)
    _, covariate, measured = simulated(10, 1.0, 0.3)
    assert not torch.equal(pool_means(measured, [covariate]).mean, pool_means(measured, []).mean)


def test_a_covariate_that_is_itself_noisy_makes_the_estimates_less_certain() -> None:
    _, covariate, measured = simulated(50, 0.5, 0.8)
    noisy = ClassMeans(covariate.mean, torch.full_like(covariate.mean, 0.3))
    assert (pool_means(measured, [noisy]).standard_error > pool_means(measured, [covariate]).standard_error).all()


def test_all_classes_are_probed_with_the_same_noises_and_pictures_only_the_teacher_gets_right_are_lost(
    student: Student, teacher: Teacher
) -> None:
    calls = count()

    def teacher_shows_all(texts: Sequence[str], pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {
            "stated": torch.full((len(texts),), 1.0 - next(calls) % 2),
            "unstated": torch.full((len(texts),), torch.nan),
        }

    prompts = [Prompt("a red star", "star", 1), Prompt("a blue ring", "ring", 2)]
    errors = probe_classes(
        student, teacher, {"one": prompts, "other": prompts}, 0, Sampler(steps=1, batch_size=4), teacher_shows_all
    )
    assert errors.paired_errors[0].tolist() == pytest.approx(errors.paired_errors[1].tolist(), rel=1e-3)
    assert float(errors.paired_errors[0, 0]) != pytest.approx(float(errors.paired_errors[0, 1]), rel=1e-3)
    assert errors.lost_pictures is not None
    assert errors.lost_pictures.tolist() == [[1, 1], [1, 1]]


def test_shares_of_the_error_average_to_one_and_follow_difficulty_and_frequency() -> None:
    difficulty = ClassMeans(torch.tensor([0.02, 0.02, 0.04]).double().log(), torch.full((3,), 0.1).double())
    parts, errors = relative_error_shares(difficulty, torch.tensor([1e6, 2e6, 1e6]).double())
    assert float(parts.mean()) == pytest.approx(1)
    assert (parts / parts[0]).tolist() == pytest.approx([1, 2, 2], rel=1e-3)
    assert errors.tolist() == pytest.approx([0.1, 0.1, 0.1], rel=1e-3)


def test_a_difference_in_frequency_within_chance_counts_for_nothing() -> None:
    difficulty = ClassMeans(torch.zeros(3).double(), torch.zeros(3).double())
    assert relative_error_shares(difficulty, torch.tensor([95.0, 105.0, 100.0]).double())[0].tolist() == pytest.approx(
        [1, 1, 1]
    )


@pytest.mark.parametrize(
    ("part", "error", "lost", "expected"),
    [
        (1.5, 0.3, None, "top"),
        (1.5, 0.5, None, "mid"),
        (0.5, 0.5, None, "low"),
        (0.7, 0.5, None, "mid"),
        (0.5, 0.1, Estimate(0.3, 0.1), "top"),
        (0.5, 0.1, Estimate(0.2, 0.1), "low"),
    ],
)
def test_only_a_share_beyond_its_standard_error_makes_a_class_top_or_low(
    part: float, error: float, lost: Estimate | None, expected: str
) -> None:
    assert assign_priority(part, error, lost) == expected


def test_the_worst_class_comes_first_and_equal_ones_are_all_mid() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 40, generator=generator).double()
    names, records = [f"class{i}" for i in range(12)], [1000] * 12
    cached = CacheErrors(list((0.3 * noise[:, :16]).exp()), None)
    worse = noise.clone()
    worse[7] += 2
    first, *others = rank_classes(names, records, ProbeErrors(0.02 * worse.exp(), None), cached)
    assert (first.pattern, first.priority) == ("class7", "top")
    assert first.relative_error_share > 2 * others[0].relative_error_share
    flat = noise - noise.mean(1, keepdim=True)
    assert {one.priority for one in rank_classes(names, records, ProbeErrors(0.02 * flat.exp(), None), cached)} == {
        "mid"
    }
