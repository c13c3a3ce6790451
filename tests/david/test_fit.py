"""Laws of the fit: it recovers a known world, and a fitted model responds to errors as it should."""

from itertools import pairwise

import pytest
import torch

from stages.david.assessment import assess_block, soft_targets
from stages.david.fit import fit_block
from stages.david.patterns import BlockStates, PatternSpace
from stages.david.trial import (
    add_noise,
    best_factor,
    calibration_error,
    evaluate_fit,
    perturbation_errors,
    reliability,
    shuffle_within,
    tune,
)
from stages.system.device import one_thread


def seeded():
    return torch.Generator().manual_seed(7)


def test_a_fit_recovers_the_bins_and_patterns_of_a_known_world(fitted, held_out):
    metrics = evaluate_fit(*fitted[:1], held_out, fitted[1], 0)
    assert metrics.within_two >= 0.99
    assert metrics.pattern_accuracy >= 0.9
    assert metrics.pattern_use >= 0.8
    assert metrics.soft_calibration <= 0.05


def test_patterns_are_the_contents_of_a_known_world_whatever_the_time(make_world, config):
    states, content = make_world(200, 3)
    features = (states.features - states.features.mean(0)) / states.features.std(0)
    labels = PatternSpace.fit(features, states.s, config.patterns, seeded()).label(features, states.s)
    pairs = torch.bincount(content * config.patterns + labels, minlength=config.patterns**2).view(config.patterns, -1)
    assert (pairs > 0).sum() == config.patterns


def test_the_same_seed_fits_the_same_bits_on_any_number_of_threads(make_world, config):
    def weights(threads):
        torch.set_num_threads(threads)
        with one_thread():
            model, space = fit_block(make_world(40, 4)[0], config.model_copy(update={"steps": 5}))
            tune(model, make_world(20, 5)[0], space, 0)
        return model.state_dict()

    try:
        first, second = weights(2), weights(1)
    finally:
        torch.set_num_threads(1)
    assert all(value.equal(second[name]) for name, value in first.items())


def test_all_three_errors_grow_with_the_noise(fitted, held_out):
    model = fitted[0]
    responses = [
        perturbation_errors(
            model, add_noise(model, held_out.features, size, seeded()), held_out.features, held_out.bins
        )
        for size in (0, 0.05, 0.1, 0.2, 0.4)
    ]
    assert responses[0] == (0, 0, 0)
    for lesser, greater in pairwise(responses):
        assert all(a < b or b == 1 for a, b in zip(lesser, greater, strict=True))


def test_anothers_content_in_the_same_bin_is_an_error_of_pattern_and_not_of_time(fitted, held_out):
    rows = shuffle_within(held_out.bins, seeded())
    e_t, e_p, _ = perturbation_errors(fitted[0], held_out.features[rows], held_out.features, held_out.bins)
    assert e_t < 0.02
    assert e_p > 0.3


def test_another_time_of_the_same_content_is_an_error_of_time_and_hardly_of_pattern(fitted, held_out):
    rows = shuffle_within(held_out.key, seeded())
    e_t, e_p, _ = perturbation_errors(fitted[0], held_out.features[rows], held_out.features, held_out.bins)
    assert e_t > 0.5
    assert e_p < 0.1


def test_a_placebo_cannot_separate_shuffled_features_from_the_teachers_own(make_world, config, held_out):
    states, q = make_world(300, 0)[0], soft_targets(held_out.bins, config.bins)

    def area(bins, generator):
        """How often the error of time of shuffled features is above that of the teacher's own."""
        labelled = BlockStates(states.features, states.s, bins, states.key)
        model, _ = fit_block(labelled, config.model_copy(update={"steps": 60}))
        others = torch.randperm(len(q), generator=generator)
        own, strange = (
            -(q * model(x, held_out.bins).log_bins).sum(1) for x in (held_out.features, held_out.features[others])
        )
        return (strange[:, None] > own).float().mean().item()

    def placebo(seed):
        generator = torch.Generator().manual_seed(seed)
        return area(states.bins[torch.randperm(len(states.bins), generator=generator)], generator)

    assert area(states.bins, seeded()) > 0.9
    assert abs(sum(placebo(seed) for seed in range(6)) / 6 - 0.5) < 0.1


def test_an_assessment_does_not_depend_on_the_rest_of_the_batch(fitted, held_out):
    model, q = fitted[0], soft_targets(held_out.bins, len(fitted[0].reliability))
    noisy = add_noise(model, held_out.features, 0.3, seeded())

    def excess(rows):
        bins = held_out.bins[rows]
        posteriors = [model(features[rows], bins) for features in (noisy, held_out.features)]
        return assess_block(*posteriors, bins, q[rows]).excess

    torch.testing.assert_close(excess(slice(0, 64))[:3], excess(slice(0, 3)))


def test_posteriors_are_the_same_in_train_and_eval_mode(fitted, held_out):
    in_use = fitted[0](held_out.features, held_out.bins).log_bins
    in_training = fitted[0].train()(held_out.features, held_out.bins).log_bins
    fitted[0].eval()
    assert in_training.equal(in_use)


def test_a_temperature_is_recovered():
    posterior = torch.randn(4000, 5, generator=seeded()).log_softmax(1)
    too_sharp = (2 * posterior).log_softmax(1)
    assert best_factor(too_sharp, posterior.exp()).item() == pytest.approx(2, rel=0.03)


def test_a_calibration_error_is_the_gap_between_confidence_and_truth():
    assert calibration_error(torch.full((10,), 0.9), (torch.arange(10) < 6).float()) == pytest.approx(0.3)
    assert calibration_error(torch.tensor([1.0, 1, 0, 0]), torch.tensor([1.0, 1, 0, 0])) == 0


def test_a_bin_that_is_never_predicted_is_unreliable():
    shares = reliability(torch.tensor([0, 1, 7, 7]), torch.tensor([0, 0, 3, 3]), 5)
    assert shares.tolist() == pytest.approx([2.5 / 3, 0.5, 0.5, 0.5 / 3, 0.5])


def test_a_shuffle_moves_every_sample_within_its_group():
    groups = torch.tensor([2, 1, 2, 1, 2, 5])
    rows = shuffle_within(groups, seeded())
    assert groups[rows].equal(groups)
    assert sorted(rows.tolist()) == list(range(6))
    assert (rows == torch.arange(6)).tolist() == [False] * 5 + [True]
