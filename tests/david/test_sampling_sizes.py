"""Laws of sampling times by difficulty over several picture sizes: the schedule stays, and the mean of the loss too."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from configs.values import PictureSize
from shards.stream.order import Pairs
from shards.stream.schedule import SizeSchedule
from stages.david.assessment import BlockAssessment
from stages.david.difficulty_profile import DifficultyProfile
from stages.david.fusion import FusionConfig
from stages.david.times import SamplingConfig, SizeStream, TimestepSampler
from stages.system.refusal import Refused

T, SEEDS = 10, 20
SIZES = [PictureSize(64, 64), PictureSize(64, 96), PictureSize(96, 64)]
ROWS = [6, 4, 3]
GENERATOR = np.random.default_rng(0)
STEPS = [  # the second size has no state near the data, the third twice as many near noise
    GENERATOR.integers(0, 1000, 400),
    GENERATOR.integers(300, 1000, 200),
    np.concatenate([GENERATOR.integers(0, 1000, 100), GENERATOR.integers(700, 1000, 100)]),
]


def profile(hard: list[int], unreliable: tuple[int, ...] = ()) -> DifficultyProfile:
    """40 samples a bin, of which some bins are hard and some cannot be classified."""
    of_bins = DifficultyProfile(FusionConfig(), T, half_life_samples=10 * T)
    for _ in range(40):
        excess, accuracy = torch.full((T,), 0.02), torch.ones(T)
        excess[hard] = 1.0
        accuracy[list(unreliable)] = 0.0
        zeros = torch.zeros(T)
        assessed = {"mid": BlockAssessment(excess, zeros, zeros + 1, excess, zeros + 0.5, accuracy)}
        of_bins.update(of_bins.observe(torch.arange(T), assessed), T)
    return of_bins


def sampler(
    seed: int = 0, scheme: str = "david", unreliable: tuple[int, ...] = (), **changes: float
) -> TimestepSampler:
    config = SamplingConfig.model_validate({"scheme": scheme, "profile_samples": 100, **changes})
    streams = [
        SizeStream(size, 1000 * seed + number, Pairs(np.full(len(k) // 2, 2)), k)
        for number, (size, k) in enumerate(zip(SIZES, STEPS, strict=True))
    ]
    return TimestepSampler(
        config, profile([0, 7, 8], unreliable), streams, SizeSchedule([*map(len, STEPS)], ROWS), 1000
    )


def sampled(sampling: TimestepSampler, samples: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the size, pairs) of each block of the first samples."""
    order = sampling.order()
    for block in sampling.schedule.blocks():
        if block.first >= samples:
            return
        records, states = order.at(np.arange(block.first, block.first + block.rows))
        yield block.size, 2 * records + states


def statistic(size: int, pairs: np.ndarray) -> np.ndarray:
    """Any number of a stored state that depends on its time and its size."""
    return (1 + size) * np.exp(STEPS[size][pairs] / 400) + np.sin(pairs)


@pytest.mark.parametrize("changes", [{}, {"timestep_shift": 3.0}, {"unreliable": (2, 9)}])
def test_the_weighted_mean_over_all_sizes_is_the_mean_under_pi(changes: dict) -> None:
    expected, stored = 0.0, np.bincount(np.concatenate(STEPS) * T // 1000, minlength=T)
    pi = sampler(**changes).pi.numpy()
    for size, k in enumerate(STEPS):
        bins = k * T // 1000
        expected += (pi[bins] / stored[bins] * statistic(size, np.arange(len(k)))).sum()
    means = {True: [], False: []}
    for seed in range(SEEDS):
        sampling = sampler(seed, **changes)
        sampling.update_q()
        total, plain, count = 0.0, 0.0, 0
        for size, pairs in sampled(sampling, 3000):
            weight = sampling.importance_weight(torch.from_numpy(STEPS[size][pairs]), SIZES[size]).numpy()
            total += (weight * statistic(size, pairs)).sum()
            plain += statistic(size, pairs).sum()
            count += len(pairs)
        means[True].append(total / count)
        means[False].append(plain / count)
    errors = {
        weighed: abs(np.mean(values) - expected) / (np.std(values, ddof=1) / np.sqrt(SEEDS))
        for weighed, values in means.items()
    }
    assert errors[True] < 3.5
    assert errors[False] > 10


def test_a_sample_has_the_same_size_under_every_q() -> None:
    sampling = sampler()
    before = [size for size, _ in sampled(sampling, 500)]
    pairs = [pairs.tolist() for _, pairs in sampled(sampling, 500)]
    sampling.update_q()
    assert [size for size, _ in sampled(sampling, 500)] == before
    assert [pairs.tolist() for _, pairs in sampled(sampling, 500)] != pairs


def test_the_effective_share_is_that_of_the_weights() -> None:
    sampling = sampler()
    sampling.update_q()
    weights = np.concatenate(
        [
            sampling.importance_weight(torch.from_numpy(STEPS[size][pairs]), SIZES[size]).numpy()
            for size, pairs in sampled(sampling, 60_000)
        ]
    )
    assert weights.mean() == pytest.approx(1, abs=0.02)
    assert weights.mean() ** 2 / (weights**2).mean() == pytest.approx(sampling.effective_share(), rel=0.02)


def train(sampling: TimestepSampler, start: int, blocks: int) -> list[tuple[int, list[float]]]:
    """(first sample, q) of each batch from a sample on, each of which changes the profile."""
    seen = []
    for block in islice(sampling.batches(start, lambda first, _order: sampling.schedule.blocks(first)), blocks):
        seen.append((block.first, sampling.q.tolist()))
        zeros, excess = torch.zeros(T), torch.arange(T) * (block.first % 7) / T
        assessed = {"mid": BlockAssessment(excess, zeros, zeros + 1, excess, zeros + 0.5, zeros + 1)}
        sampling.profile.update(sampling.profile.observe(torch.arange(T), assessed), block.rows)
    return seen


@pytest.mark.parametrize("left_at", [1, 20, 21, 22, 23, 24, 61])
def test_a_run_resumed_at_any_batch_has_the_same_q_as_one_that_was_not(left_at: int) -> None:
    whole, cut, resumed = sampler(), sampler(), sampler()
    expected = train(whole, 0, 100)
    assert train(cut, 0, left_at) == expected[:left_at]
    resumed.load_state_dict(cut.state_dict())
    assert train(resumed, whole.schedule.first_sample(left_at), 100 - left_at) == expected[left_at:]


def test_q_changes_at_the_first_batch_that_reaches_a_multiple_of_the_span() -> None:
    sampling = sampler()
    proposals = train(sampling, 0, 100)
    assert sampling.span_samples == 102  # a whole number of the largest batches
    changed = [first for (first, q), (_, before) in zip(proposals[1:], proposals, strict=False) if q != before]
    assert changed == [sampling.schedule.boundary(102 * number) for number in range(1, len(changed) + 1)]
    assert len(changed) == proposals[-1][0] // 102
    with pytest.raises(ValueError, match="1 rows into a batch"):
        next(sampling.batches(sampling.schedule.first_sample(5) + 1, lambda _first, _order: iter(())))


def test_a_size_without_a_reliable_bin_is_refused_in_the_originals_scheme() -> None:
    sampling = sampler(scheme="original", unreliable=tuple(range(3, 10)))
    sampling.update_q()
    with pytest.raises(Refused, match="no bin with states of 64x96 is reliable"):
        sampling.order()
