"""Laws of lambda: the formulas, and the memory behind them."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.david.assessment import Assessment, BlockAssessment
from stages.david.fusion import DEFAULT_BLOCK_WEIGHTS, FORMULAS, FusionConfig, RawAssessment, seed_formula
from stages.david.running import LambdaMoments, LambdaVariation, RunningAssessment, coefficient_of_variation
from stages.system.refusal import Refused

BLOCKS = tuple(DEFAULT_BLOCK_WEIGHTS)
REFERENCE = Assessment(*({block: torch.tensor(value) for block in BLOCKS} for value in (0.02, 0.04, 0.9)))
AT_ONCE = {"warmup_samples": 0, "half_life_samples": 0}
WITHOUT_DAVID = ("static", "uniform")


def voice(formula: str, **changes) -> RunningAssessment:
    config = FusionConfig.model_validate({"formula": formula, **AT_ONCE, **changes})
    return RunningAssessment(config, BLOCKS, bins=100, reference=REFERENCE)


def told_after(heard: RunningAssessment, assessed: dict[str, BlockAssessment], **weights) -> torch.Tensor:
    """His lambdas once he has learnt from this batch."""
    heard.update(heard.observe(assessed, **weights), len(assessed["mid"].excess))
    return heard.lambdas()


def said(excess=0.0, divergence=0.0, coherence=1.0, cross_entropy=0.0, entropy=0.0, b=4) -> BlockAssessment:
    return BlockAssessment(
        *(torch.full((b,), value) for value in (excess, divergence, coherence, cross_entropy, entropy))
    )


def everywhere(**numbers) -> dict[str, BlockAssessment]:
    return dict.fromkeys(BLOCKS, said(**numbers))


def worst(block: str, **numbers) -> dict[str, BlockAssessment]:
    return everywhere() | {block: said(**(numbers or {"excess": 2.0, "divergence": 0.5, "coherence": 0.6}))}


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
def test_the_seed_formula_is_the_hand_computed_number_to_the_last_digit(w, e_t, e_p, coherence, expected):
    told = seed_formula(*(torch.tensor(x, dtype=torch.float64) for x in (w, e_t, e_p, coherence)), FusionConfig())
    assert float(told) == expected


def test_the_constants_are_the_originals():
    config = FusionConfig()
    assert (config.alpha, config.beta, config.delta, config.bounds) == (0.5, 0.25, 0.25, (0.5, 3.0))
    assert tuple(config.block_weights.values()) == (0.7, 0.9, 1.0, 1.1, 1.2, 1.1, 1.0, 0.9, 0.7)
    assert list(config.block_weights) == ["down_0", "down_1", "down_2", "down_3", "mid", "up_0", "up_1", "up_2", "up_3"]


def test_every_formula_has_its_row():
    assert set(FORMULAS) == set(get_args(FusionConfig.model_fields["formula"].annotation))


@pytest.mark.parametrize("formula", sorted(set(FORMULAS) - {"uniform", "seed"}))
def test_a_faultless_student_leaves_every_block_its_own_weight(formula):
    assert (
        told_after(voice(formula), everywhere()).tolist() == torch.tensor(list(DEFAULT_BLOCK_WEIGHTS.values())).tolist()
    )


numbers = st.floats(0, 1e30)
shares = st.floats(0, 1)


@pytest.mark.parametrize("formula", sorted(FORMULAS))
@settings(deadline=None, max_examples=40)
@given(excess=st.floats(-1e30, 1e30), divergence=shares, coherence=shares, cross_entropy=numbers, entropy=shares)
def test_lambda_keeps_its_range_whatever_is_said(formula, excess, divergence, coherence, cross_entropy, entropy):
    loud = said(excess, divergence, coherence, cross_entropy, entropy)
    told = told_after(voice(formula), everywhere() | {"mid": loud, "up_3": loud})
    w = torch.tensor(list(DEFAULT_BLOCK_WEIGHTS.values()))
    within_twice = {"static": w, "absolute": w, "relative": w, "permuted": w, "mean_kept": w / 2}
    lowest, highest = (within_twice[formula], 2 * w) if formula in within_twice else (0.5, 3.0)
    assert ((told >= lowest * (1 - 1e-6)) & (told <= highest * (1 + 1e-6))).all()
    if formula == "mean_kept":
        assert float(told.mean()) == pytest.approx(float(w.mean()), rel=1e-5)


@pytest.mark.parametrize("formula", ["absolute", "relative", "mean_kept", "seed"])
def test_the_worst_block_rises_most(formula):
    loud = {"excess": 2.0, "divergence": 0.5, "coherence": 0.6, "cross_entropy": 2.0, "entropy": 0.5}
    for i, block in enumerate(BLOCKS):
        heard = voice(formula)
        assert (told_after(heard, worst(block, **loud)) / heard.baseline_lambdas).argmax() == i


@pytest.mark.parametrize("formula", WITHOUT_DAVID)
def test_arms_without_david_do_not_hear_him(formula):
    heard = voice(formula, warmup_samples=8)
    assert told_after(heard, worst("mid")).tolist() == heard.baseline_lambdas.tolist()
    assert formula == "static" or len(set(heard.baseline_lambdas.tolist())) == 1


def test_the_relative_form_is_half_way_at_the_reference_response():
    response = said(excess=0.02 * math.log(100), divergence=0.04, coherence=0.9)
    told = told_after(voice("relative"), everywhere() | {"mid": response})
    assert float(told[BLOCKS.index("mid")]) == pytest.approx(1.2 * 1.5, rel=1e-5)


def test_the_relative_form_has_a_voice_where_the_absolute_one_whispers():
    near = everywhere() | {"down_2": said(excess=0.01 * math.log(100), divergence=0.02, coherence=0.95)}
    at = BLOCKS.index("down_2")
    assert float(told_after(voice("absolute"), near)[at]) < 1.03
    assert float(told_after(voice("relative"), near)[at]) > 1.3


def test_the_seed_form_saturates_at_chance():
    at_chance = everywhere(cross_entropy=math.log(100), entropy=1.0)
    told = told_after(voice("seed"), at_chance)
    assert [float(told[i]) for i, w in enumerate(DEFAULT_BLOCK_WEIGHTS.values()) if w >= 0.85] == [3.0] * 7


def test_the_seed_form_reads_alpha_where_others_read_coherence():
    alphas = {block: 0.1 * i for i, block in enumerate(BLOCKS)}
    config = FusionConfig.model_validate({"formula": "seed", **AT_ONCE})
    told = told_after(RunningAssessment(config, BLOCKS, bins=100, cantor_alphas=alphas), everywhere(coherence=0.2))
    expected = [w * (1 + 0.25 * (1 - alphas[block])) for block, w in DEFAULT_BLOCK_WEIGHTS.items()]
    assert told.tolist() == pytest.approx(expected)


def test_the_placebo_gives_what_is_said_of_a_block_to_another_one():
    taken = []
    for i, block in enumerate(BLOCKS):
        heard = voice("permuted", placebo_seed=3)
        emphasis = told_after(heard, worst(block)) / heard.baseline_lambdas
        taken.append(int(emphasis.argmax()))
        assert taken[-1] != i
        assert float(emphasis.max()) == pytest.approx(
            float((told_after(voice("relative"), worst(block)) / heard.baseline_lambdas).max())
        )
    assert sorted(taken) == list(range(9))
    assert (
        voice("permuted", placebo_seed=3).formula_parameters.permutation.tolist()
        != voice("permuted").formula_parameters.permutation.tolist()
    )


def test_warm_up_leads_from_w_to_davids_lambda():
    heard, final = voice("absolute", warmup_samples=16), told_after(voice("absolute"), worst("mid"))
    told = [heard.lambdas(), *(told_after(heard, worst("mid")) for _ in range(5))]
    w = heard.baseline_lambdas
    for step, now in enumerate(told):
        assert torch.allclose(now, w + min(1.0, step / 4) * (final - w))
    assert told[0].tolist() == w.tolist()
    assert told[5].tolist() == final.tolist()


def test_what_was_said_counts_half_after_its_half_life_whatever_the_batch_size():
    for b in (1, 2, 4):
        heard = voice("absolute", half_life_samples=4)
        heard._vote_sums += 1e6  # a long past without faults
        for _ in range(4 // b):
            told_after(heard, everywhere(divergence=0.0, b=b))
        assert heard._vote_sums.tolist() == pytest.approx([5e5] * 9, rel=1e-4)


def test_negative_excess_is_cut_off_after_averaging_and_not_before():
    mixed = said()
    noise = BlockAssessment(torch.tensor([-1.0, 1.0, -1.0, 1.0]), *(getattr(mixed, n) for n in list(vars(mixed))[1:]))
    heard = voice("absolute", half_life_samples=100)
    assert told_after(heard, dict.fromkeys(BLOCKS, noise)).tolist() == heard.baseline_lambdas.tolist()


def test_a_sample_of_no_weight_has_a_neutral_vote():
    loud, quiet = said(excess=2.0, divergence=0.5, coherence=0.5), said(divergence=0.1)
    both = BlockAssessment(*(torch.cat([a, b]) for a, b in zip(vars(loud).values(), vars(quiet).values(), strict=True)))
    weights = torch.tensor([0.0] * 4 + [1.0] * 4)
    only = told_after(voice("absolute"), everywhere() | {"mid": quiet})
    padded = everywhere(b=8) | {"mid": both}
    assert torch.equal(told_after(voice("absolute"), padded, omega=weights), only)
    reliable = dict.fromkeys(BLOCKS, torch.ones(8, dtype=torch.bool)) | {"mid": weights > 0}
    assert torch.equal(told_after(voice("absolute"), padded, reliable=reliable), only)
    unheard = voice("absolute")
    assert (
        told_after(unheard, everywhere(divergence=1.0), omega=torch.zeros(4)).tolist()
        == unheard.baseline_lambdas.tolist()
    )


def test_a_voice_goes_on_from_its_saved_state_to_the_same_bits():
    def told(heard, first, last):
        return [told_after(heard, everywhere(excess=0.1 * i, divergence=0.01 * i)).tolist() for i in range(first, last)]

    settings = {"warmup_samples": 20, "half_life_samples": 7}
    whole, cut, resumed = (voice("mean_kept", **settings) for _ in range(3))
    expected = told(whole, 0, 9)
    told(cut, 0, 4)
    resumed.load_state_dict(cut.state_dict())
    told(cut, 4, 9)  # the state that was handed out does not change behind its back
    assert told(resumed, 4, 9) == expected[4:]


def test_the_three_numbers_are_told_by_block():
    heard = voice("static")
    told_after(heard, worst("up_1", excess=math.log(100) / 4, divergence=0.5, coherence=0.75))
    now = heard.assessment()
    assert (float(now.timestep_error["up_1"]), float(now.pattern_error["up_1"])) == (pytest.approx(0.25), 0.5)
    assert float(now.coherence["up_1"]) == 0.75
    assert (float(now.timestep_error["mid"]), float(now.coherence["mid"])) == (0.0, 1.0)


def test_a_formula_without_its_reference_is_refused():
    for formula in ("relative", "mean_kept", "permuted"):
        with pytest.raises(Refused, match=f"{formula}: this David brings no reference"):
            RunningAssessment(FusionConfig(formula=formula), BLOCKS, bins=100)


def test_a_weight_of_an_unknown_block_is_refused():
    with pytest.raises(Refused, match=r"block_weights\.midd: no such block - did you mean mid"):
        RunningAssessment(FusionConfig(formula="static", block_weights={"midd": 1.0}), BLOCKS, bins=100)
    other = RunningAssessment(FusionConfig(formula="static"), ("mid", "head"), bins=100)
    assert other.baseline_lambdas.tolist() == pytest.approx([1.2, 1.0])


def test_a_state_of_other_blocks_is_refused():
    with pytest.raises(Refused, match="speaks of 9 blocks, this student has 2"):
        RunningAssessment(FusionConfig(formula="static"), ("mid", "up_0"), bins=100).load_state_dict(
            voice("static").state_dict()
        )


def test_falling_bounds_are_refused():
    with pytest.raises(ValidationError, match="should rise"):
        FusionConfig(bounds=(3.0, 0.5))


def test_the_coefficient_of_variation_is_deviation_over_mean():
    values = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert coefficient_of_variation(values, 1).tolist() == [0.5, 0.0]


def variation(told: torch.Tensor, w: torch.Tensor) -> LambdaVariation:
    emphasis = LambdaMoments(w)
    for line in told:
        emphasis.update(line)
    found = emphasis.variation(torch.ones(len(w), dtype=torch.bool))
    assert found is not None
    return found


def test_static_weights_are_silent_and_a_rising_block_is_not():
    w = torch.tensor(list(DEFAULT_BLOCK_WEIGHTS.values()))
    static = variation(w.repeat(5, 1), w)
    assert static.is_constant
    assert static.summary().startswith("David was silent: lambda varied by 0.0%")
    rising = w.repeat(5, 1)
    rising[:, 4] *= torch.linspace(1, 1.5, 5)
    loud = variation(rising, w)
    assert not loud.is_constant
    assert loud.summary().startswith("David spoke")
    assert variation(1.3 * w.repeat(5, 1), w).is_constant, "another learning rate is no voice"


def test_the_faultless_word_is_nothing_wrong():
    word = RawAssessment.zero_error(torch.ones(2))
    assert (word.timestep_error.tolist(), word.pattern_error.tolist(), word.coherence.tolist()) == (
        [0, 0],
        [0, 0],
        [1, 1],
    )
