import pytest
import torch
from pydantic import ValidationError

from stages.nets.student import Prediction
from stages.system.refusal import Refused
from stages.train.losses import FeatureScale, Losses
from stages.train.objective import Objective, ObjectiveConfig

BLOCKS = ("mid", "up_3")
SCALE = FeatureScale({block: torch.ones(1, 3) for block in BLOCKS})
SCALES = torch.tensor([1.5, 6.0])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def objective(**changes) -> Objective:
    return Objective(ObjectiveConfig(**changes), BLOCKS, SCALE)


def exact(batch) -> Prediction:
    return Prediction(batch.v_cond.clone(), batch.v_uncond.clone(), {b: f.clone() for b, f in batch.features.items()})


def off(batch, by: float = 1.0) -> Prediction:
    features = {block: feature + by for block, feature in batch.features.items()}
    return Prediction(batch.v_cond + by, batch.v_uncond - by, features)


def test_an_exact_student_has_no_loss(batch):
    losses = objective()(exact(batch), batch, torch.ones(2), 0.05, SCALES)
    assert losses.total == losses.flow == losses.guidance == 0
    assert losses.blocks.tolist() == [0.0, 0.0]


def test_total_is_the_weighted_sum_of_its_parts(batch):
    lambdas = torch.tensor([2.0, 5.0])
    losses = objective(guidance_weight=0.3)(off(batch), batch, lambdas, 0.1, SCALES)
    rest = losses.flow + 0.3 * losses.guidance
    assert losses.rest.item() == pytest.approx(rest.item())
    assert losses.total.item() == pytest.approx((rest + 0.1 * (lambdas * losses.blocks).sum()).item())
    assert losses.flow.item() == pytest.approx(1.0)


def test_lambdas_scale_the_gradient_of_each_block_alone(batch):
    gradients = []
    for lambdas in ([1.0, 1.0], [3.0, 0.0]):
        output = off(batch)
        for feature in output.features.values():
            feature.requires_grad_(True)
        objective()(output, batch, torch.tensor(lambdas), 0.05, SCALES).total.backward()
        gradients.append({block: feature.grad for block, feature in output.features.items()})
    assert torch.allclose(gradients[1]["mid"], 3 * gradients[0]["mid"])
    assert gradients[0]["up_3"].abs().sum() > 0
    assert gradients[1]["up_3"].abs().sum() == 0


def test_the_block_term_is_zero_when_its_share_of_training_is_over(batch):
    output = off(batch)
    for feature in output.features.values():
        feature.requires_grad_(True)
    losses = objective()(output, batch, torch.ones(2), 0.0, SCALES)
    assert losses.total.item() == pytest.approx((losses.flow + losses.guidance).item())
    assert not losses.total.requires_grad
    assert losses.blocks.tolist() == pytest.approx([1.0, 1.0])


def test_the_block_term_stays_without_an_end():
    assert ObjectiveConfig(blocks_until=None).annealed_block_weight(1.0) == ObjectiveConfig().block_weight


def test_static_lambdas_are_the_weights_of_the_configuration():
    assert objective().static_lambdas(torch.device("cpu")).tolist() == [1.0, 0.0]


def test_the_cosine_form_needs_no_deviations(batch):
    plain = Objective(ObjectiveConfig(block_form="cosine"), BLOCKS)
    opposite = Prediction(batch.v_cond, batch.v_uncond, {b: -f for b, f in batch.features.items()})
    assert plain(opposite, batch, torch.ones(2), 0.05, SCALES).blocks.tolist() == pytest.approx([2.0, 2.0])


def test_a_cache_without_features_trains_without_the_block_term(batch):
    losses = Objective(ObjectiveConfig(), ())(off(batch), batch, torch.zeros(0), 0.05, SCALES)
    assert losses.blocks.shape == (0,)
    assert losses.total.item() == pytest.approx((losses.flow + losses.guidance).item())


def test_importance_weights_weight_samples_and_are_not_normalised(batch):
    plain = objective()(off(batch), batch, torch.ones(2), 0.05, SCALES)
    double = objective()(off(batch), batch, torch.ones(2), 0.05, SCALES, torch.full((2,), 2.0))
    assert double.total.item() == pytest.approx(2 * plain.total.item())
    assert torch.equal(double.flow_errors, plain.flow_errors)


def test_the_errors_of_each_sample_are_unweighted(batch):
    importance_weight, w = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 7.5])
    losses = objective(loss_weighting="min_snr")(off(batch), batch, torch.ones(2), 0.05, w, importance_weight)
    assert losses.flow_errors.tolist() == pytest.approx([1.0, 1.0])
    assert losses.block_errors.flatten().tolist() == pytest.approx([1.0] * 4)
    assert losses.blocks.tolist() == pytest.approx([1.5, 1.5])
    guided = (2 * w - 1) ** 2 / (w**2 + (w - 1) ** 2)  # branches off by 1 and -1
    assert losses.guidance_errors.tolist() == pytest.approx(guided.tolist())
    assert torch.equal(losses.importance_weight, importance_weight)


def test_the_losses_of_equal_chunks_merge_to_those_of_the_batch(batch):
    first, second = (
        objective()(output, batch, torch.ones(2), 0.05, torch.tensor([3.0, 3.0]), torch.tensor(importance_weight))
        for output, importance_weight in ((off(batch), [1.0, 2.0]), (off(batch, 2.0), [0.5, 0.25]))
    )
    joined = Losses.merge_chunks([first, second])
    assert joined.total.item() == pytest.approx((first.total.item() + second.total.item()) / 2)
    assert joined.flow_errors.tolist() == pytest.approx([1.0, 1.0, 4.0, 4.0])
    assert joined.block_errors.shape == (2, 4)
    assert joined.importance_weight.tolist() == [1.0, 2.0, 0.5, 0.25]
    assert joined.flow.item() == pytest.approx((joined.importance_weight * joined.flow_errors).mean().item())


def test_min_snr_weights_velocity_errors_by_time(batch):
    losses = objective(loss_weighting="min_snr", min_snr_gamma=5.0)(off(batch), batch, torch.ones(2), 0.05, SCALES)
    expected = torch.minimum((1 - batch.s) ** 2, 5 * batch.s**2).mean()
    assert losses.flow.item() == pytest.approx(expected.item())
    assert losses.flow_errors.tolist() == pytest.approx([1.0, 1.0])


def test_the_unconditional_branch_can_be_left_out(batch):
    output = Prediction(batch.v_cond, batch.v_uncond + 1, batch.features)
    assert objective(uncond_weight=0)(output, batch, torch.ones(2), 0.05, SCALES).flow == 0
    assert objective(uncond_weight=1)(output, batch, torch.ones(2), 0.05, SCALES).flow.item() == pytest.approx(0.5)


def test_guidance_scales_fill_their_range_and_follow_the_generator(batch):
    constant = objective(guidance_range=(3, 3)).sample_guidance_scales(len(batch), generator())
    assert constant.tolist() == [3.0, 3.0]
    first, second = (objective().sample_guidance_scales(len(batch), generator()) for _ in range(2))
    assert torch.equal(first, second)


def test_a_weight_for_a_block_that_the_cache_lacks_is_refused():
    with pytest.raises(Refused, match=r"block_weights\.mdi.*did you mean mid"):
        objective(block_weights={"mdi": 2.0})


@pytest.mark.parametrize("slip", [{"guidance_range": (8, 1)}, {"block_weights": {"mid": -1}}, {"blocks_until": 0}])
def test_senseless_settings_are_refused(slip):
    with pytest.raises(ValidationError):
        ObjectiveConfig(**slip)
