"""Laws of the three numbers: their ranges, their zero, what they do not depend on."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.david.assessment import (
    BlockAssessment,
    Posterior,
    assess_block,
    bins_of,
    js_divergence,
    reduce,
    soft_targets,
)
from stages.david.block_model import BlockModel

LOGITS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6)
HUGE = st.lists(st.floats(allow_nan=False, width=32), min_size=6, max_size=6)


def block(excess, divergence=0.2, coherence=0.7):
    n = len(excess)
    excess = torch.tensor(excess)
    return BlockAssessment(excess, torch.full((n,), divergence), torch.full((n,), coherence), excess, excess)


@pytest.mark.parametrize(("steps", "k"), [(1000, [0, 9, 10, 999]), (200, [0, 1, 2, 199]), (4000, [0, 39, 40, 3999])])
def test_a_step_falls_into_the_bin_of_its_hundredth_however_many_steps_the_teacher_has(steps, k):
    assert bins_of(torch.tensor(k), SimpleNamespace(bins=100, steps=steps)).tolist() == [0, 0, 1, 99]


def test_soft_targets_are_a_gaussian_of_three_quarters_of_a_bin():
    q = soft_targets(torch.tensor([50]), 100)[0]
    assert (q[50] / q[53]).log().item() == pytest.approx(8, rel=1e-4)
    assert torch.special.entr(q).sum().item() == pytest.approx(
        math.log(0.75 * math.sqrt(2 * math.pi * math.e)), abs=1e-3
    )


@given(LOGITS, LOGITS)
def test_the_divergence_is_symmetric_and_bounded(a, b):
    p, q = (torch.tensor([logits]).log_softmax(1) for logits in (a, b))
    assert js_divergence(p, q).equal(js_divergence(q, p))
    assert 0 <= js_divergence(p, q) <= 1


def test_the_divergence_is_zero_for_equals_and_one_for_strangers():
    certain = (torch.tensor([[1.0, 0, 0], [0, 1, 0]])).log()
    assert js_divergence(certain, certain).tolist() == [0, 0]
    assert js_divergence(certain, certain.flip(0)).tolist() == [1, 1]


@given(LOGITS)
def test_the_divergence_of_near_equals_is_an_eighth_of_their_chi_square(a):
    log_p = torch.tensor([a]).double().div(1e3).log_softmax(1)
    tilt = 1e-4 * torch.tensor([[1.0, -1, 1, -1, 1, -1]], dtype=torch.float64)
    p, q = log_p.exp(), (log_p + tilt).softmax(1)
    expected = ((p - q).square() / (8 * p)).sum() / math.log(2)
    assert js_divergence(log_p, q.log()).item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_divergence_of_spikes_that_leave_all_but_nothing_elsewhere_is_one():
    spike = torch.tensor([[0.0, -60, -70], [-60, 0, -70]])
    torch.testing.assert_close(js_divergence(spike, spike.flip(0)), torch.ones(2))


def test_a_constant_in_all_logits_changes_nothing():
    logits = torch.tensor([[0.5, -1, 2]])
    torch.testing.assert_close((logits + 3).log_softmax(1), logits.log_softmax(1))


@given(HUGE, HUGE)
def test_three_numbers_lie_between_zero_and_one_for_any_features(a, b):
    companion = BlockModel(6, bins=4, patterns=3, dimensions=8, generator=torch.Generator().manual_seed(0))
    bins = torch.tensor([2])
    with torch.no_grad():
        student, teacher = (companion(torch.tensor([features]), bins) for features in (a, b))
    one = reduce({"mid": assess_block(student, teacher, bins, soft_targets(bins, 4))}, 4)
    numbers = [one.timestep_error["mid"], one.pattern_error["mid"], one.coherence["mid"]]
    assert all(0 <= number <= 1 for number in numbers)


def test_the_teachers_own_features_give_exactly_nothing_to_say():
    companion = BlockModel(6, bins=4, patterns=3, dimensions=8, generator=torch.Generator().manual_seed(0))
    features, bins = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 4
    with torch.no_grad():
        student, teacher = companion(features, bins), companion(features, bins)
    one = reduce({"mid": assess_block(student, teacher, bins, soft_targets(bins, 4))}, 4)
    assert (one.timestep_error["mid"], one.pattern_error["mid"], one.coherence["mid"]) == (0, 0, 1)


def test_an_excess_is_cut_off_after_it_is_averaged():
    assert reduce({"mid": block([2.0, -2.0])}, 8).timestep_error["mid"] == 0
    assert reduce({"mid": block([2.0, 0.0])}, 8).timestep_error["mid"].item() == pytest.approx(1 / math.log(8))


def test_weights_are_the_weights_of_a_mean():
    weighted = reduce({"mid": block([1.0, 0.2])}, 8, weights=torch.tensor([1.0, 3.0]))
    repeated = reduce({"mid": block([1.0, 0.2, 0.2, 0.2])}, 8)
    torch.testing.assert_close(weighted.timestep_error["mid"], repeated.timestep_error["mid"])


def test_an_unreliable_bin_has_no_vote():
    heard = reduce({"mid": block([0.4, 50.0])}, 8, reliable={"mid": torch.tensor([True, False])})
    torch.testing.assert_close(heard.timestep_error["mid"], reduce({"mid": block([0.4])}, 8).timestep_error["mid"])


def test_a_block_without_a_reliable_sample_keeps_its_weight():
    silent = reduce({"mid": block([0.4, 50.0])}, 8, reliable={"mid": torch.tensor([False, False])})
    assert (silent.timestep_error["mid"], silent.pattern_error["mid"], silent.coherence["mid"]) == (0, 0, 1)


def test_the_raw_quantities_are_the_originals():
    certain, even = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.full((1, 4), 0.25).log()
    said = Posterior(certain, even, torch.tensor([0.5]))
    raw = assess_block(said, said, torch.tensor([1]), soft_targets(torch.tensor([1]), 3))
    assert raw.cross_entropy.item() == pytest.approx(-math.log(0.2), rel=1e-6)
    assert raw.entropy.item() == pytest.approx(1)
