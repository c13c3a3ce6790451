"""Laws of lambda: the formulas, and the running means behind them."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.david.assessment import Assessment, BlockAssessment
from stages.david.fusion import FORMULAS, PUBLISHED_BLOCK_WEIGHTS, FusionConfig, emphasis, translate_stored
from stages.david.running import LambdaMoments, LambdaVariation, RunningAssessment, coefficient_of_variation
from stages.system.refusal import Refused

BLOCKS = tuple(PUBLISHED_BLOCK_WEIGHTS)
REFERENCES = torch.tensor([0.02, 0.04, 0.1]).expand(9, 3)
W = torch.tensor(list(PUBLISHED_BLOCK_WEIGHTS.values()))
AT_ONCE = {"warmup_samples": 0, "half_life_samples": 0}
WITHOUT_DAVID = ("static", "uniform")


def running(formula: str, w=PUBLISHED_BLOCK_WEIGHTS, **changes) -> RunningAssessment:
    config = FusionConfig.model_validate({"formula": formula, **AT_ONCE, **changes})
    return RunningAssessment(config, w, bins=100, references=REFERENCES)


def lambdas_after(state: RunningAssessment, assessed: dict[str, BlockAssessment], **weights) -> torch.Tensor:
    """The lambdas after an update by this batch."""
    state.update(state.observe(assessed, **weights), len(assessed["mid"].excess))
    return state.lambdas()


def block(excess=0.0, divergence=0.0, coherence=1.0, cross_entropy=0.0, entropy=0.0, b=4) -> BlockAssessment:
    values = (excess, divergence, coherence, cross_entropy, entropy, 1.0)
    return BlockAssessment(*(torch.full((b,), value) for value in values))


def all_blocks(**numbers) -> dict[str, BlockAssessment]:
    return dict.fromkeys(BLOCKS, block(**numbers))


def worst(name: str, **numbers) -> dict[str, BlockAssessment]:
    return all_blocks() | {name: block(**(numbers or {"excess": 2.0, "divergence": 0.5, "coherence": 0.6}))}


@pytest.mark.parametrize(
    ("w", "e_t", "e_p", "coherence", "expected"),
    [
        (1.0, 0.0, 0.0, 1.0, 1.0),
        (0.7, 0.0, 0.0, 1.0, 0.7),
        (1.0, 1.0, 1.0, 0.0, 2.0),
        (1.2, 1.0, 1.0, 0.0, 2.4),
        (1.0, 0.5, 0.25, 0.5, 1.4375),
        (0.7, 0.0, 0.0, 0.5, 0.7 * 1.125),
        (1.2, 0.0, 0.0, 0.5, 1.2 * 1.125),
        (1.0, 3.0, 1.0, 0.5, 2.875),
        (1.0, 3.25, 1.0, 0.5, 3.0),
        (1.0, 4.605, 1.0, 0.5, 3.0),
        (1.2, 2.5, 1.0, 0.5, 3.0),
        (0.3, 0.0, 0.0, 1.0, 0.5),
        (1.0, 0.0, 0.0, 4.0, 0.5),
    ],
)
def test_the_formula_is_the_hand_computed_number_to_the_last_digit(w, e_t, e_p, coherence, expected):
    inputs = [torch.tensor(x, dtype=torch.float64) for x in (e_t, e_p, coherence)]
    assert float((w * emphasis(*inputs, FusionConfig())).clamp(*FusionConfig().bounds)) == expected


def test_the_constants_are_the_originals():
    config = FusionConfig()
    assert (config.alpha, config.beta, config.delta, config.bounds) == (0.5, 0.25, 0.25, (0.5, 3.0))
    assert tuple(PUBLISHED_BLOCK_WEIGHTS.values()) == (0.7, 0.9, 1.0, 1.1, 1.2, 1.1, 1.0, 0.9, 0.7)
    assert BLOCKS == ("down_0", "down_1", "down_2", "down_3", "mid", "up_0", "up_1", "up_2", "up_3")


def test_every_formula_has_its_row():
    assert set(FORMULAS) == set(get_args(FusionConfig.model_fields["formula"].annotation))


@pytest.mark.parametrize("formula", sorted(set(FORMULAS) - {"uniform", "original"}))
def test_a_faultless_student_leaves_every_block_its_own_weight(formula):
    assert lambdas_after(running(formula), all_blocks()).tolist() == W.tolist()


numbers = st.floats(0, 1e30)
shares = st.floats(0, 1)


@pytest.mark.parametrize("formula", sorted(FORMULAS))
@settings(deadline=None, max_examples=40)
@given(excess=st.floats(-1e30, 1e30), divergence=shares, coherence=shares, cross_entropy=numbers, entropy=shares)
def test_lambda_keeps_its_range_for_any_assessment(formula, excess, divergence, coherence, cross_entropy, entropy):
    wrong = block(excess, divergence, coherence, cross_entropy, entropy)
    lambdas = lambdas_after(running(formula), all_blocks() | {"mid": wrong, "up_3": wrong})
    w = W
    within_twice = {"static": w, "absolute": w, "relative": w, "permuted": w, "shuffled": w, "mean_kept": w / 2}
    lowest, highest = (within_twice[formula], 2 * w) if formula in within_twice else (0.5, 3.0)
    assert ((lambdas >= lowest * (1 - 1e-6)) & (lambdas <= highest * (1 + 1e-6))).all()
    if formula == "mean_kept":
        assert float(lambdas.mean()) == pytest.approx(float(w.mean()), rel=1e-5)


@pytest.mark.parametrize("formula", ["absolute", "relative", "mean_kept", "original"])
def test_the_worst_block_rises_most(formula):
    wrong = {"excess": 2.0, "divergence": 0.5, "coherence": 0.6, "cross_entropy": 2.0, "entropy": 0.5}
    for i, block in enumerate(BLOCKS):
        state = running(formula)
        assert (lambdas_after(state, worst(block, **wrong)) / state.baseline_lambdas).argmax() == i


@pytest.mark.parametrize("formula", WITHOUT_DAVID)
def test_constant_formulas_ignore_the_assessment(formula):
    state = running(formula, warmup_samples=8)
    assert lambdas_after(state, worst("mid")).tolist() == state.baseline_lambdas.tolist()
    assert formula == "static" or len(set(state.baseline_lambdas.tolist())) == 1


def test_the_relative_form_is_half_way_at_the_reference_response():
    response = block(excess=0.02 * math.log(100), divergence=0.04, coherence=0.9)
    lambdas = lambdas_after(running("relative"), all_blocks() | {"mid": response})
    assert float(lambdas[BLOCKS.index("mid")]) == pytest.approx(1.2 * 1.5, rel=1e-5)


def test_the_relative_form_reacts_where_the_absolute_one_hardly_does():
    near = all_blocks() | {"down_2": block(excess=0.01 * math.log(100), divergence=0.02, coherence=0.95)}
    at = BLOCKS.index("down_2")
    assert float(lambdas_after(running("absolute"), near)[at]) < 1.03
    assert float(lambdas_after(running("relative"), near)[at]) > 1.3


def test_the_original_formula_saturates_at_chance():
    at_chance = all_blocks(cross_entropy=math.log(100), entropy=1.0)
    lambdas = lambdas_after(running("original"), at_chance)
    assert [float(lambdas[i]) for i, w in enumerate(PUBLISHED_BLOCK_WEIGHTS.values()) if w >= 0.85] == [3.0] * 7


def test_the_original_formula_takes_alpha_for_coherence():
    alphas = {block: 0.1 * i for i, block in enumerate(BLOCKS)}
    config = FusionConfig.model_validate({"formula": "original", **AT_ONCE})
    lambdas = lambdas_after(
        RunningAssessment(config, PUBLISHED_BLOCK_WEIGHTS, bins=100, cantor_alphas=alphas), all_blocks(coherence=0.2)
    )
    expected = [w * (1 + 0.25 * (1 - alphas[block])) for block, w in PUBLISHED_BLOCK_WEIGHTS.items()]
    assert lambdas.tolist() == pytest.approx(expected)


def test_the_placebo_gives_the_emphasis_of_a_block_to_another_one():
    taken = []
    for i, block in enumerate(BLOCKS):
        state = running("permuted", placebo_seed=3)
        emphasis = lambdas_after(state, worst(block)) / state.baseline_lambdas
        taken.append(int(emphasis.argmax()))
        assert taken[-1] != i
        assert float(emphasis.max()) == pytest.approx(
            float((lambdas_after(running("relative"), worst(block)) / state.baseline_lambdas).max())
        )
    assert sorted(taken) == list(range(9))
    assert (
        running("permuted", placebo_seed=3).formula_parameters.permutation.tolist()
        != running("permuted").formula_parameters.permutation.tolist()
    )


@pytest.mark.parametrize("idle", [(), ("up_3",), ("down_0", "mid", "up_3"), tuple(BLOCKS[:7]), tuple(BLOCKS[:8])])
def test_the_placebo_has_the_emphases_of_the_blocks_that_count_and_of_no_other(idle):
    """All w_b alike: its lambdas are those of `relative` in another order, whatever the others look like."""
    weights = {block: 0.0 if block in idle else 1.0 for block in BLOCKS}
    judged = {b: block(excess=0.3 * i, divergence=0.1 * i, coherence=1 - 0.05 * i) for i, b in enumerate(BLOCKS)}
    judged |= {b: block(excess=math.log(100), divergence=1.0, coherence=0.0) for b in idle}
    ours = lambdas_after(running("relative", weights), judged)
    for seed in range(5):
        placebo = lambdas_after(running("shuffled", weights, placebo_seed=seed), judged)
        assert sorted(placebo.tolist()) == pytest.approx(sorted(ours.tolist()))
        moved = (placebo != ours).tolist()
        assert moved == [weights[b] > 0 and len(BLOCKS) - len(idle) > 1 for b in BLOCKS]


def test_warm_up_leads_from_w_to_davids_lambda():
    state, final = running("absolute", warmup_samples=16), lambdas_after(running("absolute"), worst("mid"))
    lambdas = [state.lambdas(), *(lambdas_after(state, worst("mid")) for _ in range(5))]
    w = state.baseline_lambdas
    for step, now in enumerate(lambdas):
        assert torch.allclose(now, w + min(1.0, step / 4) * (final - w))
    assert lambdas[0].tolist() == w.tolist()
    assert lambdas[5].tolist() == final.tolist()


def test_an_observation_counts_half_after_its_half_life_whatever_the_batch_size():
    for b in (1, 2, 4):
        state = running("absolute", half_life_samples=4)
        state._weight_sums += 1e6  # a long past without faults
        for _ in range(4 // b):
            lambdas_after(state, all_blocks(divergence=0.0, b=b))
        assert state._weight_sums.tolist() == pytest.approx([5e5] * 9, rel=1e-4)


def test_negative_excess_is_cut_off_after_averaging_and_not_before():
    mixed = block()
    noise = BlockAssessment(torch.tensor([-1.0, 1.0, -1.0, 1.0]), *list(vars(mixed).values())[1:])
    state = running("absolute", half_life_samples=100)
    assert lambdas_after(state, dict.fromkeys(BLOCKS, noise)).tolist() == state.baseline_lambdas.tolist()


def test_a_sample_of_weight_zero_does_not_count():
    wrong, nearly_right = block(excess=2.0, divergence=0.5, coherence=0.5), block(divergence=0.1)
    both = BlockAssessment(
        *(torch.cat([a, b]) for a, b in zip(vars(wrong).values(), vars(nearly_right).values(), strict=True))
    )
    weights = torch.tensor([0.0] * 4 + [1.0] * 4)
    only = lambdas_after(running("absolute"), all_blocks() | {"mid": nearly_right})
    padded = all_blocks(b=8) | {"mid": both}
    assert torch.equal(lambdas_after(running("absolute"), padded, importance_weight=weights), only)
    reliable = dict.fromkeys(BLOCKS, torch.ones(8, dtype=torch.bool)) | {"mid": weights > 0}
    assert torch.equal(lambdas_after(running("absolute"), padded, reliable=reliable), only)
    unweighted = running("absolute")
    assert (
        lambdas_after(unweighted, all_blocks(divergence=1.0), importance_weight=torch.zeros(4)).tolist()
        == unweighted.baseline_lambdas.tolist()
    )


def test_a_running_assessment_resumes_to_the_same_bits():
    def lambdas(state, first, last):
        return [
            lambdas_after(state, all_blocks(excess=0.1 * i, divergence=0.01 * i)).tolist() for i in range(first, last)
        ]

    settings = {"warmup_samples": 20, "half_life_samples": 7}
    whole, cut, resumed = (running("mean_kept", **settings) for _ in range(3))
    expected = lambdas(whole, 0, 9)
    lambdas(cut, 0, 4)
    resumed.load_state_dict(cut.state_dict())
    lambdas(cut, 4, 9)  # which leaves the saved state as it was
    assert lambdas(resumed, 4, 9) == expected[4:]


def test_the_shuffled_placebo_permutes_anew_in_each_half_life_and_resumes():
    """With a half-life of 100 samples, 40 samples an update: the permutation changes at 120, 200, 320, ..."""

    config = FusionConfig(formula="shuffled", warmup_samples=0, half_life_samples=100)
    state, other = (RunningAssessment(config, PUBLISHED_BLOCK_WEIGHTS, bins=100, references=REFERENCES) for _ in "ab")
    seen = []
    for _ in range(50):
        sums = state.observe(worst("mid"))
        state.update(sums, 40)
        seen.append(int((state.lambdas() / state.baseline_lambdas).argmax()))
        other.load_state_dict(state.state_dict())
        assert torch.equal(other.lambdas(), state.lambdas())
    in_one_half_life = {}
    for i, block in enumerate(seen):
        in_one_half_life.setdefault(40 * (i + 1) // 100, set()).add(block)
    assert all(len(blocks) == 1 for blocks in in_one_half_life.values())
    assert len({*seen}) > 4
    assert BLOCKS.index("mid") not in seen


def test_the_assessment_is_in_the_order_of_the_blocks():
    state = running("static")
    lambdas_after(state, worst("up_1", excess=math.log(100) / 4, divergence=0.5, coherence=0.75))
    now = state.assessment()
    up_1, mid = BLOCKS.index("up_1"), BLOCKS.index("mid")
    assert (float(now.timestep_error[up_1]), float(now.pattern_error[up_1])) == (pytest.approx(0.25), 0.5)
    assert float(now.coherence[up_1]) == 0.75
    assert (float(now.timestep_error[mid]), float(now.coherence[mid])) == (0.0, 1.0)


def test_a_formula_without_its_reference_is_refused():
    for formula in ("relative", "mean_kept", "permuted", "shuffled"):
        with pytest.raises(Refused, match=f"{formula}: this David brings no reference"):
            RunningAssessment(FusionConfig(formula=formula), PUBLISHED_BLOCK_WEIGHTS, bins=100)


@pytest.mark.parametrize("formula", sorted(FORMULAS))
def test_a_block_of_weight_zero_has_lambda_zero_and_leaves_the_others_alone(formula):
    others = {name: w for name, w in PUBLISHED_BLOCK_WEIGHTS.items() if name != "up_3"}
    assessed = worst("mid") | {"up_3": block(excess=3.0, divergence=1.0, coherence=0.0, cross_entropy=4.0)}
    with_zero = lambdas_after(running(formula, others | {"up_3": 0.0}, warmup_samples=8), assessed)
    assert with_zero[8] == 0
    config = FusionConfig.model_validate({"formula": formula, **AT_ONCE, "warmup_samples": 8})
    without = RunningAssessment(config, others, bins=100, references=REFERENCES[:8])
    torch.testing.assert_close(with_zero[:8], lambdas_after(without, assessed))


STORED = {
    "david": {"fusion": {"formula": "seed", "alpha": 0.5, "block_weights": PUBLISHED_BLOCK_WEIGHTS | {"mid": 2.0}}},
    "objective": {"block_weights": {"up_3": 0.0, "up_2": 1.0}, "block_weight": 0.2},
    "graft": True,
}


def test_stored_settings_of_earlier_versions_are_read_with_one_vector_of_weights():
    translated = translate_stored(STORED)
    assert translated == {
        "david": {"fusion": {"formula": "original", "alpha": 0.5}},
        "objective": {"block_weights": {"mid": 2.0, "up_3": 0.0, "up_2": 0.9}, "block_weight": 0.2},
        "graft": True,
    }
    assert translate_stored(translated) == translated
    assert STORED["david"]["fusion"]["formula"] == "seed", "what was read is left as it is"
    assert translate_stored({"david": 5}) == {"david": 5}


def test_the_formula_seed_of_earlier_yaml_is_the_original_one():
    assert FusionConfig.model_validate({"formula": "seed"}).formula == "original"


def test_a_second_vector_of_weights_is_refused_by_the_name_of_the_first():
    with pytest.raises(ValidationError, match=r"set w_b in objective\.block_weights"):
        FusionConfig.model_validate({"block_weights": {"mid": 1.0}})


def test_weights_are_the_weights_of_a_mean():
    excess = block(b=2), torch.tensor([1.0, 0.2])
    one = BlockAssessment(excess[1], *list(vars(excess[0]).values())[1:])
    repeated = BlockAssessment(torch.tensor([1.0, 0.2, 0.2, 0.2]), *list(vars(block()).values())[1:])
    weighted = lambdas_after(
        running("absolute"), dict.fromkeys(BLOCKS, one), importance_weight=torch.tensor([1.0, 3.0])
    )
    torch.testing.assert_close(weighted, lambdas_after(running("absolute"), dict.fromkeys(BLOCKS, repeated)))


def test_a_block_without_a_reliable_sample_keeps_its_weight():
    reliable = {name: torch.full((4,), name != "mid") for name in BLOCKS}
    lambdas = lambdas_after(running("absolute"), worst("mid"), reliable=reliable)
    assert lambdas.tolist() == W.tolist()


def test_a_state_of_other_blocks_is_refused():
    with pytest.raises(Refused, match="has 9 blocks, this student has 2"):
        RunningAssessment(FusionConfig(formula="static"), {"mid": 1.0, "up_0": 1.0}, bins=100).load_state_dict(
            running("static").state_dict()
        )


def test_falling_bounds_are_refused():
    with pytest.raises(ValidationError, match="should rise"):
        FusionConfig(bounds=(3.0, 0.5))


def test_the_coefficient_of_variation_is_deviation_over_mean():
    values = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert coefficient_of_variation(values, 1).tolist() == [0.5, 0.0]


def variation_of(lambdas: torch.Tensor, w: torch.Tensor) -> LambdaVariation:
    moments = LambdaMoments(w)
    for line in lambdas:
        moments.update(line)
    variation = moments.variation()
    assert variation is not None
    return variation


def test_static_weights_are_constant_and_a_rising_block_is_not():
    w = W
    static = variation_of(w.repeat(5, 1), w)
    assert static.is_constant
    assert static.summary().startswith("David had no effect: lambda varied by 0.0%")
    rising = w.repeat(5, 1)
    rising[:, 4] *= torch.linspace(1, 1.5, 5)
    wrong = variation_of(rising, w)
    assert not wrong.is_constant
    assert wrong.summary().startswith("David: lambda varied by")
    assert variation_of(1.3 * w.repeat(5, 1), w).is_constant, "another learning rate is no effect of David"


def test_zero_error_is_the_teachers_own():
    zero = Assessment.zero_error(torch.ones(2))
    assert (zero.timestep_error.tolist(), zero.pattern_error.tolist(), zero.coherence.tolist()) == (
        [0, 0],
        [0, 0],
        [1, 1],
    )
