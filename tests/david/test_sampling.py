"""Laws of David's choice of times: what he asks for moves the variance of the loss, and never its mean."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shards.manifest import Recipe
from shards.order import Order, Pairs
from shards.reader import Reader, View
from shards.record import BlockFeatures, Record, States
from shards.writer import CacheWriter
from stages.david.assessment import BlockAssessment, Posterior
from stages.david.fusion import FusionConfig
from stages.david.times import (
    DifficultyProfile,
    SamplingConfig,
    TimestepSampler,
    bin_accuracy,
    difficulty_distribution,
    effective_share,
    mix_distributions,
    shift_distribution,
)
from stages.system.refusal import Refused

T, N, SEEDS = 10, 400, 20
STEPS = np.random.default_rng(0).integers(0, 1000, 2 * N)  # two draws of each record
PAIRS = Pairs(np.full(N, 2))


def record(number: int) -> Record:
    """A small record whose two draws have times of their own."""
    k = torch.tensor([(97 * number) % 500, 999 - (61 * number) % 500])
    state = torch.full((2, 3, 4, 5), float(number)).half()
    draws = States(k=k, s=k / 1000, x_t=state, v_cond=state, v_uncond=state, trajectory=k < 500)
    features = BlockFeatures({"mid": torch.zeros(2, 3).half()})
    return Record(f"{number:09d}", "a star", "star", number, 3.0, torch.zeros(2, 7).half(), state[0], draws, features)


def assessed(excess: torch.Tensor) -> dict[str, BlockAssessment]:
    zeros = torch.zeros_like(excess)
    return {"mid": BlockAssessment(excess, zeros, zeros + 1, excess.clamp_min(0), zeros + 0.5)}


def sees(profile: DifficultyProfile, bins: torch.Tensor, *said) -> None:
    profile.update(profile.observe(bins, *said), len(bins))


def difficult(hard: list[int], blind: tuple[int, ...] = (), bins: int = T) -> DifficultyProfile:
    """A profile of 40 samples a bin, in which some bins are hard, and some are not to be told."""
    profile = DifficultyProfile(FusionConfig(), bins, half_life_samples=10 * bins)
    for _ in range(40):
        excess = torch.full((bins,), 0.02)
        excess[hard] = 1.0
        seen = torch.ones(bins)
        seen[list(blind)] = 0.0
        sees(profile, torch.arange(bins), assessed(excess), seen)
    return profile


def choice(scheme: str, seed: int = 0, hard=(7, 8), blind=(), **changes) -> TimestepSampler:
    config = SamplingConfig.model_validate({"scheme": scheme, "profile_samples": 100, **changes})
    made = TimestepSampler(config, difficult(list(hard), blind), seed, PAIRS, STEPS, 1000, batch_size=8)
    made.update_q()
    return made


def statistic(pairs: np.ndarray) -> np.ndarray:
    """Any number of a stored draw that has to do with its time: a loss that is large near noise."""
    return np.exp(STEPS[pairs] / 400) + np.sin(pairs)


def drawn(made: TimestepSampler, n: int = 2000) -> np.ndarray:
    records, draws = made.order().at(np.arange(n))
    return 2 * records + draws


def z_score(scheme: str, weigh: bool, **changes) -> float:
    """How many standard errors the mean over 20 seeds lies from the mean under pi."""
    reference = choice(scheme, **changes)
    bin_of_pair = STEPS * T // 1000
    share_of_pair = reference.pi.numpy()[bin_of_pair] / np.bincount(bin_of_pair, minlength=T)[bin_of_pair]
    expected = (share_of_pair * statistic(np.arange(2 * N))).sum()
    means = []
    for seed in range(SEEDS):
        made = choice(scheme, seed, **changes)
        pairs = drawn(made)
        omega = made.importance_weight(torch.from_numpy(STEPS[pairs])).numpy() if weigh else 1.0
        means.append((omega * statistic(pairs)).mean())
    return abs(float(np.mean(means) - expected)) / (float(np.std(means, ddof=1)) / np.sqrt(SEEDS))


@pytest.mark.parametrize("changes", [{}, {"timestep_shift": 3.0}, {"hard": (0,), "blind": (3, 4)}])
def test_the_weighted_mean_of_a_statistic_is_its_mean_under_pi(changes):
    assert z_score("david", weigh=True, **changes) < 3


def test_without_the_weights_the_mean_is_another_one():
    assert z_score("david", weigh=False) > 10


def test_the_originals_scheme_is_biased_and_weighs_nothing():
    assert choice("original").importance_weight(torch.tensor([0, 500])).tolist() == [1.0, 1.0]
    assert z_score("original", weigh=True) > 10


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1e6), min_size=T, max_size=T), st.floats(0, 0.99))
def test_no_bin_is_switched_off_and_half_of_the_samples_stay_effective(difficulty, share):
    pi = choice("stored").pi
    q = mix_distributions(pi, difficulty_distribution(pi, torch.tensor(difficulty, dtype=torch.float64)), share)
    assert float(q.sum()) == pytest.approx(1)
    assert ((pi / q) <= (1 + 1e-9) / (1 - share)).all()
    assert effective_share(pi, q) >= 0.5


def test_difficult_bins_are_asked_for_more_often_and_weigh_less():
    made = choice("david")
    raised = made.q / made.pi
    assert set(raised.argsort()[-2:].tolist()) == {7, 8}
    assert float(raised[7]) > 1.5
    counts = np.bincount(STEPS[drawn(made, 20000)] * T // 1000, minlength=T)
    expected = 20000 * made.q.numpy()
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()
    assert made.importance_weight(torch.tensor([750])).item() == pytest.approx(1 / float(raised[7]))


def test_david_of_no_share_and_a_faultless_student_leave_pi():
    assert torch.equal(choice("david", david_share=0.0).q, choice("david").pi)
    silent = TimestepSampler(
        SamplingConfig(scheme="david"), DifficultyProfile(FusionConfig(), T, 100), 0, PAIRS, STEPS, 1000, batch_size=8
    )
    silent.update_q()
    torch.testing.assert_close(silent.q, silent.pi)
    assert silent.effective_share() == pytest.approx(1)


def test_a_bin_that_cannot_be_told_is_neutral_and_off_only_in_the_originals_scheme():
    profile = difficult([7], blind=(2,))
    difficulty = profile.difficulty(0.15)
    reliable = [k for k in range(T) if k != 2]
    assert float(difficulty[2]) == pytest.approx(float(difficulty[reliable].mean()))
    assert choice("david", blind=(2,)).q[2] > 0
    assert choice("original", blind=(2,)).q[2] == 0


def test_the_original_with_no_bin_to_trust_is_refused():
    with pytest.raises(Refused, match="David trusts no bin"):
        choice("original", blind=tuple(range(T)))


@pytest.mark.parametrize("scheme", ["david", "original"])
def test_the_first_span_is_drawn_by_pi_and_fills_the_profile(scheme):
    made = choice(scheme)
    made.profile, made.q = DifficultyProfile(FusionConfig(), T, half_life_samples=100), made.pi
    learnt(made, 0, 13)
    assert torch.equal(made.q, made.pi)
    learnt(made, 13, 1)
    assert not torch.equal(made.q, made.pi)


def test_shift_is_a_part_of_pi_and_leans_to_noise():
    uniform = torch.full((T,), 1 / T, dtype=torch.float64)
    centre = torch.arange(T) + 0.5
    means = [float((shift_distribution(uniform, factor) * centre).sum()) for factor in (0.5, 1.0, 1.8, 3.0)]
    assert means == sorted(means)
    assert means[1] == pytest.approx(T / 2)
    assert float(shift_distribution(torch.full((4,), 0.25, dtype=torch.float64), 3.0)[0]) == pytest.approx(0.1)
    assert float(shift_distribution(uniform, 3.0).sum()) == pytest.approx(1)
    assert (choice("david", timestep_shift=3.0).pi * centre).sum() > (choice("david").pi * centre).sum()


def test_a_shift_that_nobody_draws_is_refused():
    with pytest.raises(ValidationError, match=r"timestep_shift = 3\.0 needs scheme david"):
        SamplingConfig(timestep_shift=3.0)


def test_bins_of_which_nothing_is_stored_are_not_asked_for():
    steps = np.where(STEPS < 500, STEPS, 999 - STEPS)  # nothing above the middle
    made = TimestepSampler(SamplingConfig(scheme="david"), difficult([2, 9]), 0, PAIRS, steps, 1000, batch_size=8)
    made.update_q()
    assert made.q[5:].tolist() == made.pi[5:].tolist() == [0.0] * 5
    assert float(made.q.sum()) == pytest.approx(1)
    assert made.importance_weight(torch.tensor([100, 900])).tolist() == [
        pytest.approx(float(made.pi[1] / made.q[1])),
        0.0,
    ]


def test_the_profile_is_the_mean_of_each_bin_and_forgets():
    profile = DifficultyProfile(FusionConfig(beta=0.0, alpha=1.0), 4, half_life_samples=8)
    bins = torch.tensor([0, 0, 1, 1])
    sees(profile, bins, assessed(torch.tensor([1.0, 0.0, -0.3, 0.3])), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert profile._means()[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert profile.reliable_bins(0.6).tolist() == [False, True, False, False]
    sees(profile, bins, assessed(torch.tensor([0.0, 0.0, 0.0, 0.0])), torch.ones(4))
    sees(profile, bins, assessed(torch.tensor([0.0, 0.0, 0.0, 0.0])), torch.ones(4))
    newer = 1 + 2**-0.5
    assert profile._means()[0, 0].item() == pytest.approx(0.5 * 0.5 / (0.5 + newer))


def test_a_bin_seldom_seen_is_drawn_to_the_mean_of_all():
    profile = DifficultyProfile(FusionConfig(), T, half_life_samples=10 * T)
    for _ in range(50):
        sees(profile, torch.arange(T), assessed(torch.full((T,), 0.1)), torch.ones(T))
    profile = difficult([])
    before = profile.difficulty(0.0)
    sees(profile, torch.tensor([4]), assessed(torch.tensor([4.0])), torch.ones(1))
    raised = profile.difficulty(0.0)[4] - before[4]
    assert 0 < raised < 0.05


def test_right_counts_the_blocks_that_find_the_bin_or_its_neighbour():
    def says(*bins: int) -> Posterior:
        return Posterior(torch.eye(T)[list(bins)].log_softmax(1), torch.zeros(3, 1), torch.ones(3))

    assert bin_accuracy({"a": says(3, 4, 9), "b": says(4, 6, 0)}, torch.tensor([3, 4, 0])).tolist() == [1.0, 0.5, 0.5]


def learnt(made: TimestepSampler, start: int, batches: int) -> list[list[int]]:
    """Training that teaches the profile something at every batch of 8: the pairs it asked for."""

    def stream(first: int, order: Order) -> Iterator[np.ndarray]:
        for begin in count(first, 8):
            records, draws = order.at(np.arange(begin, begin + 8))
            yield 2 * records + draws

    seen = []
    for number, pairs in zip(range(start, start + batches), made.batches(8 * start, stream), strict=False):
        bins = torch.from_numpy(STEPS[pairs] * T // 1000)
        sees(made.profile, bins, assessed(bins.float() / T * (number % 5)), torch.ones(8))
        seen.append(pairs.tolist())
    return seen


@pytest.mark.parametrize("left_at", [3, 13, 20, 26])  # a span of 100 samples is 13 batches of 8
def test_a_run_left_anywhere_asks_for_the_same_draws_as_one_that_was_not(left_at):
    whole, cut, resumed = choice("david"), choice("david"), choice("david")
    expected = learnt(whole, 0, 40)
    assert whole.span_samples == 104
    assert learnt(cut, 0, left_at) == expected[:left_at]
    resumed.load_state_dict(cut.state_dict())
    assert learnt(resumed, left_at, 40 - left_at) == expected[left_at:]
    assert torch.equal(resumed.q, whole.q)


def test_q_follows_the_profile_from_span_to_span_and_stays_inside_one():
    made = choice("david")
    found = [(learnt(made, number, 1), made.q)[1] for number in range(30)]
    changes = [number for number in range(1, 30) if not torch.equal(found[number], found[number - 1])]
    assert changes == [13, 26]


def test_a_stream_taken_up_inside_a_batch_is_refused():
    with pytest.raises(ValueError, match="sample 13 is 5 rows into a batch"):
        next(choice("david").batches(13, lambda _first, _order: iter(())))


def test_a_reader_brings_the_draws_that_david_asks_for(tmp_path: Path):
    records = [record(number) for number in range(12)]
    CacheWriter(tmp_path, Recipe(identity={"a": 1}, information={})).add("train", 0, records)
    reader = Reader(tmp_path, seed=5, batch_size=3, view=View(s_range=(0.2, 1.0)))
    stored = [(r.key, draw, int(r.states.k[draw])) for r in records for draw in range(2) if r.states.s[draw] >= 0.2]
    assert reader.timesteps.tolist() == [k for _, _, k in stored]
    profile = difficult([4])
    made = TimestepSampler(
        SamplingConfig(scheme="david", profile_samples=6), profile, 5, reader.pairs, reader.timesteps, 1000, 3
    )
    batches = [batch for _, batch in zip(range(5), made.batches(0, reader.batches), strict=False)]
    rows = [row for b in batches for row in zip(b.keys, b.state_index.tolist(), b.k.tolist(), strict=True)]
    assert set(rows) <= set(stored)
    bins = dict(zip(stored, made._bin_of_pair.tolist(), strict=True))
    assert [float(w) for b in batches for w in made.importance_weight(b.k)] == pytest.approx(
        [float(made.pi[bins[row]] / made.q[bins[row]]) for row in rows]
    )


def test_a_profile_of_other_bins_is_refused():
    with pytest.raises(Refused, match="has 4 bins of time, this David has 10"):
        choice("david").profile.load_state_dict(DifficultyProfile(FusionConfig(), 4, 8).state_dict())
