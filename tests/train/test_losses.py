import pytest
import torch

from shards.stats import Statistics
from stages.flow.solver import apply_guidance
from stages.flow.timesteps import bin_of_time
from stages.train.losses import FeatureScale, block_errors, cosine_errors, guidance_error, velocity_error
from stages.train.objective import feature_deviations


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(feature: torch.Tensor, s: torch.Tensor, bins: int = 1) -> FeatureScale:
    return FeatureScale({"mid": feature_deviations(Statistics.from_values(feature, bin_of_time(s, bins), bins))})


def test_velocity_error_is_the_mean_square_of_each_sample():
    v, v_star = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    v_star[1] = 3.0
    assert velocity_error(v, v_star).tolist() == [0.0, 9.0]


def test_guidance_error_is_the_error_of_the_guided_velocity_over_its_amplification():
    v_c, v_u, c, u = (normal(2, 3, 4, 5, seed=i).double() for i in range(4))
    w = torch.tensor([1.0, 7.5], dtype=torch.float64)
    direct = velocity_error(apply_guidance(v_c, v_u, w), apply_guidance(c, u, w)) / torch.tensor([1.0, 7.5**2 + 6.5**2])
    assert torch.allclose(guidance_error(v_c - c, v_u - u, w), direct.to(torch.float64), rtol=1e-5)


def test_guidance_error_of_independent_branch_errors_is_their_own_size():
    e_c, e_u = normal(2, 200_000, seed=1), normal(2, 200_000, seed=2)
    assert guidance_error(e_c, e_u, torch.tensor([2.0, 8.0])).tolist() == pytest.approx([1.0, 1.0], abs=0.02)


def test_guidance_error_is_zero_when_both_branches_are_exact():
    zero = torch.zeros(2, 3, 4, 5)
    assert guidance_error(zero, zero, torch.tensor([1.0, 8.0])).tolist() == [0.0, 0.0]


def test_block_errors_are_counted_in_deviations_and_keep_the_order_of_the_targets():
    targets = {"up_0": torch.zeros(2, 3), "mid": torch.zeros(2, 4)}
    features = {"mid": torch.full((2, 4), 6.0), "up_0": torch.full((2, 3), 1.0)}
    deviations = {"mid": torch.full((2, 4), 3.0), "up_0": torch.full((2, 3), 0.5)}
    assert block_errors(features, targets, deviations).tolist() == [[4.0, 4.0], [4.0, 4.0]]


def test_block_errors_of_equal_features_are_zero_in_both_forms():
    features = {"mid": normal(2, 3)}
    assert block_errors(features, features, {"mid": torch.ones(2, 3)}).tolist() == [[0.0, 0.0]]
    assert cosine_errors(features, features)[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_cosine_errors_are_invariant_to_the_size_of_a_feature():
    features = {"mid": normal(2, 3)}
    louder, opposite = {"mid": 7 * features["mid"]}, {"mid": -features["mid"]}
    assert cosine_errors(louder, features)[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert cosine_errors(opposite, features)[0].tolist() == pytest.approx([2.0, 2.0], abs=1e-6)


def test_deviations_are_measured_in_each_bin_of_s_and_looked_up_by_time():
    s = torch.tensor([0.1, 0.2, 0.9, 0.8])
    feature = torch.tensor([[0.0, 5.0], [2.0, 6.0], [0.0, 5.0], [20.0, 7.0]])
    scale = measured(feature, s, bins=2)
    deviations = scale.at(torch.tensor([0.95, 0.3]))["mid"]
    assert torch.allclose(deviations, torch.stack([feature[2:].std(dim=0), feature[:2].std(dim=0)]))


def test_a_bin_with_a_single_state_takes_the_deviations_of_all():
    feature = torch.tensor([[0.0], [2.0], [9.0]])
    scale = measured(feature, torch.tensor([0.1, 0.2, 0.9]), bins=2)
    torch.testing.assert_close(scale.deviations["mid"][1], feature.std(dim=0))


def test_a_constant_channel_does_not_dominate_the_others():
    feature = torch.stack([torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 3.0])], dim=1)
    deviation = measured(feature, torch.rand(4)).deviations["mid"]
    assert 0 < deviation[0, 0] < 0.02 * deviation[0, 1]
