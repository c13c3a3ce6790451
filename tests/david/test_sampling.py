"""Laws of sampling times by difficulty: it moves the variance of the loss, and never its mean."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.values import PictureSize
from shards.manifest import Recipe
from shards.reader import Reader
from shards.record import BlockFeatures, Record, States
from shards.stream.order import Order, Pairs
from shards.stream.schedule import SizeSchedule
from shards.stream.view import View
from shards.writer import CacheWriter
from stages.david.assessment import BlockAssessment
from stages.david.difficulty_profile import DifficultyProfile
from stages.david.fusion import FusionConfig
from stages.david.times import (
    SamplingConfig,
    SizeStream,
    TimestepSampler,
    difficulty_distribution,
    effective_share,
    mix_distributions,
    shift_distribution,
)
from stages.system.refusal import Refused

T, N, SEEDS = 10, 400, 20
STEPS = np.random.default_rng(0).integers(0, 1000, 2 * N)  # two states of each record
PAIRS = Pairs(np.full(N, 2))


def record(number: int) -> Record:
    """A small record whose two states have times of their own."""
    k = torch.tensor([(97 * number) % 500, 999 - (61 * number) % 500])
    state = torch.full((2, 3, 4, 5), float(number)).half()
    states = States(k=k, s=k / 1000, x_s=state, v_cond=state, v_uncond=state, trajectory=k < 500)
    features = BlockFeatures({"mid": torch.zeros(2, 3).half()})
    cond, size = torch.zeros(2, 7).half(), PictureSize(40, 32)
    return Record(f"{number:09d}", "a star", "star", number, 3.0, cond, state[0], states, features, size)


def update(profile: DifficultyProfile, bins: torch.Tensor, excess: torch.Tensor, accuracy=None) -> None:
    zeros = torch.zeros_like(excess)
    accuracy = zeros + 1 if accuracy is None else accuracy
    assessed = {"mid": BlockAssessment(excess, zeros, zeros + 1, excess.clamp_min(0), zeros + 0.5, accuracy)}
    profile.update(profile.observe(bins, assessed), len(bins))


def difficult(hard: list[int], unreliable: tuple[int, ...] = (), bins: int = T) -> DifficultyProfile:
    """A profile of 40 samples a bin, in which some bins are hard, and some cannot be classified."""
    profile = DifficultyProfile(FusionConfig(), bins, half_life_samples=10 * bins)
    for _ in range(40):
        excess = torch.full((bins,), 0.02)
        excess[hard] = 1.0
        accuracy = torch.ones(bins)
        accuracy[list(unreliable)] = 0.0
        update(profile, torch.arange(bins), excess, accuracy)
    return profile


def sampler_of(config: SamplingConfig, profile: DifficultyProfile, seed: int = 0, steps=STEPS) -> TimestepSampler:
    """Of states of one size, in batches of 8."""
    return TimestepSampler(config, profile, [SizeStream(None, seed, PAIRS, steps)], SizeSchedule([2 * N], [8]), 1000)


def sampler(scheme: str, seed: int = 0, hard=(7, 8), unreliable=(), **changes) -> TimestepSampler:
    config = SamplingConfig.model_validate({"scheme": scheme, "profile_samples": 100, **changes})
    sampling = sampler_of(config, difficult(list(hard), unreliable), seed)
    sampling.update_q()
    return sampling


def statistic(pairs: np.ndarray) -> np.ndarray:
    """Any number of a stored state that depends on its time: a loss that is large near noise."""
    return np.exp(STEPS[pairs] / 400) + np.sin(pairs)


def sampled_pairs(sampling: TimestepSampler, n: int = 2000) -> np.ndarray:
    records, states = sampling.order().at(np.arange(n))
    return 2 * records + states


def z_score(scheme: str, weigh: bool, **changes) -> float:
    """How many standard errors the mean over 20 seeds lies from the mean under pi."""
    reference = sampler(scheme, **changes)
    bin_of_pair = STEPS * T // 1000
    share_of_pair = reference.pi.numpy()[bin_of_pair] / np.bincount(bin_of_pair, minlength=T)[bin_of_pair]
    expected = (share_of_pair * statistic(np.arange(2 * N))).sum()
    means = []
    for seed in range(SEEDS):
        sampling = sampler(scheme, seed, **changes)
        pairs = sampled_pairs(sampling)
        weight = sampling.importance_weight(torch.from_numpy(STEPS[pairs])).numpy() if weigh else 1.0
        means.append((weight * statistic(pairs)).mean())
    return abs(float(np.mean(means) - expected)) / (float(np.std(means, ddof=1)) / np.sqrt(SEEDS))


@pytest.mark.parametrize("changes", [{}, {"timestep_shift": 3.0}, {"hard": (0,), "unreliable": (3, 4)}])
def test_the_weighted_mean_of_a_statistic_is_its_mean_under_pi(changes):
    assert z_score("david", weigh=True, **changes) < 3


def test_without_the_weights_the_mean_is_another_one():
    assert z_score("david", weigh=False) > 10


def test_the_originals_scheme_is_biased_and_weighs_nothing():
    assert sampler("original").importance_weight(torch.tensor([0, 500])).tolist() == [1.0, 1.0]
    assert z_score("original", weigh=True) > 10


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1e6), min_size=T, max_size=T), st.floats(0, 0.99))
def test_no_bin_is_switched_off_and_half_of_the_samples_stay_effective(difficulty, share):
    pi = sampler("stored").pi
    q = mix_distributions(pi, difficulty_distribution(pi, torch.tensor(difficulty, dtype=torch.float64)), share)
    assert float(q.sum()) == pytest.approx(1)
    assert ((pi / q) <= (1 + 1e-9) / (1 - share)).all()
    assert effective_share(pi, q) >= 0.5


def test_difficult_bins_are_sampled_more_often_and_weigh_less():
    sampling = sampler("david")
    raised = sampling.q / sampling.pi
    assert set(raised.argsort()[-2:].tolist()) == {7, 8}
    assert float(raised[7]) > 1.5
    counts = np.bincount(STEPS[sampled_pairs(sampling, 20000)] * T // 1000, minlength=T)
    expected = 20000 * sampling.q.numpy()
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()
    assert sampling.importance_weight(torch.tensor([750])).item() == pytest.approx(1 / float(raised[7]))


def test_david_of_no_share_and_a_faultless_student_leave_pi():
    assert torch.equal(sampler("david", david_share=0.0).q, sampler("david").pi)
    uniform_error = sampler_of(SamplingConfig(scheme="david"), DifficultyProfile(FusionConfig(), T, 100))
    uniform_error.update_q()
    torch.testing.assert_close(uniform_error.q, uniform_error.pi)
    assert uniform_error.effective_share() == pytest.approx(1)


def test_an_unreliable_bin_is_neutral_and_off_only_in_the_originals_scheme():
    profile = difficult([7], unreliable=(2,))
    difficulty = profile.difficulty(0.15)
    reliable = [k for k in range(T) if k != 2]
    assert float(difficulty[2]) == pytest.approx(float(difficulty[reliable].mean()))
    assert sampler("david", unreliable=(2,)).q[2] > 0
    assert sampler("original", unreliable=(2,)).q[2] == 0


def test_the_original_scheme_without_a_reliable_bin_is_refused():
    with pytest.raises(Refused, match="no bin is reliable"):
        sampler("original", unreliable=tuple(range(T)))


@pytest.mark.parametrize("scheme", ["david", "original"])
def test_the_first_span_is_sampled_from_pi_and_fills_the_profile(scheme):
    sampling = sampler(scheme)
    sampling.profile, sampling.q = DifficultyProfile(FusionConfig(), T, half_life_samples=100), sampling.pi
    train(sampling, 0, 13)
    assert torch.equal(sampling.q, sampling.pi)
    train(sampling, 13, 1)
    assert not torch.equal(sampling.q, sampling.pi)


def test_shift_is_a_part_of_pi_and_leans_to_noise():
    uniform = torch.full((T,), 1 / T, dtype=torch.float64)
    centre = torch.arange(T) + 0.5
    means = [float((shift_distribution(uniform, factor) * centre).sum()) for factor in (0.5, 1.0, 1.8, 3.0)]
    assert means == sorted(means)
    assert means[1] == pytest.approx(T / 2)
    assert float(shift_distribution(torch.full((4,), 0.25, dtype=torch.float64), 3.0)[0]) == pytest.approx(0.1)
    assert float(shift_distribution(uniform, 3.0).sum()) == pytest.approx(1)
    assert (sampler("david", timestep_shift=3.0).pi * centre).sum() > (sampler("david").pi * centre).sum()


def test_a_shift_without_a_sampler_is_refused():
    with pytest.raises(ValidationError, match=r"timestep_shift = 3\.0 needs scheme david"):
        SamplingConfig(timestep_shift=3.0)


def test_bins_of_which_nothing_is_stored_are_not_sampled():
    steps = np.where(STEPS < 500, STEPS, 999 - STEPS)  # nothing above the middle
    sampling = sampler_of(SamplingConfig(scheme="david"), difficult([2, 9]), steps=steps)
    sampling.update_q()
    assert sampling.q[5:].tolist() == sampling.pi[5:].tolist() == [0.0] * 5
    assert float(sampling.q.sum()) == pytest.approx(1)
    assert sampling.importance_weight(torch.tensor([100, 900])).tolist() == [
        pytest.approx(float(sampling.pi[1] / sampling.q[1])),
        0.0,
    ]


def test_the_profile_is_the_mean_of_each_bin_and_forgets():
    profile = DifficultyProfile(FusionConfig(beta=0.0, alpha=1.0), 4, half_life_samples=8)
    bins = torch.tensor([0, 0, 1, 1])
    update(profile, bins, torch.tensor([1.0, 0.0, -0.3, 0.3]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert profile._means()[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert profile.reliable_bins(0.6).tolist() == [False, True, False, False]
    update(profile, bins, torch.zeros(4))
    update(profile, bins, torch.zeros(4))
    newer = 1 + 2**-0.5
    assert profile._means()[0, 0].item() == pytest.approx(0.5 * 0.5 / (0.5 + newer))


def test_a_bin_with_few_observations_is_shrunk_to_the_mean_of_all():
    profile = DifficultyProfile(FusionConfig(), T, half_life_samples=10 * T)
    for _ in range(50):
        update(profile, torch.arange(T), torch.full((T,), 0.1))
    profile = difficult([])
    before = profile.difficulty(0.0)
    update(profile, torch.tensor([4]), torch.tensor([4.0]))
    raised = profile.difficulty(0.0)[4] - before[4]
    assert 0 < raised < 0.05


def train(sampling: TimestepSampler, start: int, batches: int) -> list[list[int]]:
    """Updates of the profile at every batch of 8; the pairs that were sampled."""

    def stream(first: int, order: Order) -> Iterator[np.ndarray]:
        for begin in count(first, 8):
            records, states = order.at(np.arange(begin, begin + 8))
            yield 2 * records + states

    sampled = []
    for number, pairs in zip(range(start, start + batches), sampling.batches(8 * start, stream), strict=False):
        bins = torch.from_numpy(STEPS[pairs] * T // 1000)
        update(sampling.profile, bins, bins.float() / T * (number % 5))
        sampled.append(pairs.tolist())
    return sampled


@pytest.mark.parametrize("left_at", [3, 13, 20, 26])  # a span of 100 samples is 13 batches of 8
def test_a_run_resumed_anywhere_samples_the_same_states_as_one_that_was_not(left_at):
    whole, cut, resumed = sampler("david"), sampler("david"), sampler("david")
    expected = train(whole, 0, 40)
    assert whole.span_samples == 104
    assert train(cut, 0, left_at) == expected[:left_at]
    resumed.load_state_dict(cut.state_dict())
    assert train(resumed, left_at, 40 - left_at) == expected[left_at:]
    assert torch.equal(resumed.q, whole.q)


def test_q_follows_the_profile_from_span_to_span_and_stays_inside_one():
    sampling = sampler("david")
    proposals = [(train(sampling, number, 1), sampling.q)[1] for number in range(30)]
    changes = [number for number in range(1, 30) if not torch.equal(proposals[number], proposals[number - 1])]
    assert changes == [13, 26]


def test_a_stream_resumed_inside_a_batch_is_refused():
    with pytest.raises(ValueError, match="sample 13 is 5 rows into a batch"):
        next(sampler("david").batches(13, lambda _first, _order: iter(())))


def test_a_reader_reads_the_states_in_the_order_of_the_sampler(tmp_path: Path):
    records = [record(number) for number in range(12)]
    CacheWriter(tmp_path, Recipe(identity={"a": 1}, information={})).add("train", 0, records)
    reader = Reader(tmp_path, seed=5, batch_size=3, view=View(s_range=(0.2, 1.0)))
    stored = [(r.key, state, int(r.states.k[state])) for r in records for state in range(2) if r.states.s[state] >= 0.2]
    assert reader.timesteps_of_sizes[0].tolist() == [k for _, _, k in stored]
    profile = difficult([4])
    by_size = zip(reader.sizes, reader.seeds, reader.pairs_of_sizes, reader.timesteps_of_sizes, strict=True)
    config, streams = SamplingConfig(scheme="david", profile_samples=6), [SizeStream(*given) for given in by_size]
    sampling = TimestepSampler(config, profile, streams, reader.schedule, 1000)
    batches = [batch for _, batch in zip(range(5), sampling.batches(0, reader.batches), strict=False)]
    rows = [row for b in batches for row in zip(b.keys, b.state_index.tolist(), b.k.tolist(), strict=True)]
    assert set(rows) <= set(stored)
    bins = dict(zip(stored, sampling._bin_of_pair[0].tolist(), strict=True))
    assert [float(w) for b in batches for w in sampling.importance_weight(b.k)] == pytest.approx(
        [float(sampling.pi[bins[row]] / sampling.q[bins[row]]) for row in rows]
    )


def test_a_profile_of_other_bins_is_refused():
    with pytest.raises(Refused, match="has 4 bins of time, this David has 10"):
        sampler("david").profile.load_state_dict(DifficultyProfile(FusionConfig(), 4, 8).state_dict())
