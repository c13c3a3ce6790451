"""Laws of an assessment: ranges, zero error, and what it does not depend on."""

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
    return BlockAssessment(excess, torch.full((n,), divergence), torch.full((n,), coherence), excess, excess, excess)


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


def test_the_divergence_is_zero_for_equal_and_one_for_disjoint_posteriors():
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
    model = BlockModel(6, bins=4, patterns=3, dimensions=8, generator=torch.Generator().manual_seed(0))
    bins = torch.tensor([2])
    with torch.no_grad():
        student, teacher = (model(torch.tensor([features]), bins) for features in (a, b))
    mean = reduce({"mid": assess_block(student, teacher, bins, soft_targets(bins, 4))}, 4)
    numbers = [mean.timestep_error, mean.pattern_error, mean.coherence]
    assert all(0 <= number <= 1 for number in numbers)


def test_the_teachers_own_features_have_exactly_no_error():
    model = BlockModel(6, bins=4, patterns=3, dimensions=8, generator=torch.Generator().manual_seed(0))
    features, bins = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 4
    with torch.no_grad():
        student, teacher = model(features, bins), model(features, bins)
    mean = reduce({"mid": assess_block(student, teacher, bins, soft_targets(bins, 4))}, 4)
    assert (mean.timestep_error, mean.pattern_error, mean.coherence) == (0, 0, 1)


def test_an_excess_is_cut_off_after_it_is_averaged():
    assert reduce({"mid": block([2.0, -2.0])}, 8).timestep_error == 0
    assert reduce({"mid": block([2.0, 0.0])}, 8).timestep_error.item() == pytest.approx(1 / math.log(8))


def test_teacher_accuracy_counts_the_true_bin_and_its_neighbours():
    log_bins = torch.eye(8)[[3, 4, 7]].log_softmax(1)
    posterior = Posterior(log_bins, torch.zeros(3, 1).log_softmax(1), torch.ones(3))
    bins = torch.tensor([3, 3, 0])
    raw = assess_block(posterior, posterior, bins, soft_targets(bins, 8))
    assert raw.teacher_accuracy.tolist() == [1.0, 1.0, 0.0]


def test_a_selection_holds_the_samples_of_its_mask():
    assert block([1.0, 2.0, 3.0]).select(torch.tensor([True, False, True])).excess.tolist() == [1.0, 3.0]


def test_the_raw_quantities_are_the_originals():
    certain, even = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.full((1, 4), 0.25).log()
    posterior = Posterior(certain, even, torch.tensor([0.5]))
    raw = assess_block(posterior, posterior, torch.tensor([1]), soft_targets(torch.tensor([1]), 3))
    assert raw.cross_entropy.item() == pytest.approx(-math.log(0.2), rel=1e-6)
    assert raw.entropy.item() == pytest.approx(1)
