"""Laws of the records: what is kept of each picture, and the exact input of the teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shards.codec import encode
from stages.cache.targets import StatesConfig, draw_randomness, make_records
from stages.flow.bridge import Bridge
from stages.flow.solver import apply_guidance, euler
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts import GrammarSource, prompts

MODEL = "stages/tiny/model"
PROMPTS = prompts(GrammarSource(grammar=Path("stages/tiny/grammar.yaml")), 0, "train", 3)
KEYS = [f"{i:09d}" for i in range(3)]
CONFIG = StatesConfig(steps=8)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components(MODEL, torch.device("cpu"), torch.float32), "hold")


def test_choices_depend_on_the_prompt_alone() -> None:
    one, again = (draw_randomness(PROMPTS[0], CONFIG, (4, 8, 8)) for _ in range(2))
    other = draw_randomness(replace(PROMPTS[0], seed=PROMPTS[0].seed + 1), CONFIG, (4, 8, 8))
    assert torch.equal(one.noise, again.noise)
    assert one.guidance_scale == again.guidance_scale
    assert not torch.equal(one.noise, other.noise)


def test_one_state_is_kept_of_every_stratum_of_the_sampling() -> None:
    for prompt in prompts(GrammarSource(grammar=Path("stages/tiny/grammar.yaml")), 1, "train", 50):
        kept = draw_randomness(prompt, CONFIG, (4, 8, 8)).kept_steps
        assert (kept // 2).tolist() == [0, 1, 2, 3]


def test_times_start_at_noise_and_fall_to_the_data_with_a_random_phase() -> None:
    times = torch.stack([draw_randomness(prompt, CONFIG, (4, 8, 8)).times for prompt in PROMPTS])
    assert (times[:, 0] == 1).all()
    assert (times.diff(dim=1) < 0).all()
    assert (times[:, -1] < 1 / 7).all()
    assert len(set(times[:, -1].tolist())) == 3


def test_stored_outputs_are_the_teachers_at_the_stored_states(teacher: Teacher) -> None:
    """The input was rounded before the prediction, so predicting again gives the stored output."""
    record = make_records(teacher, PROMPTS, KEYS, CONFIG)[1]
    states, cond = record.states, record.cond.float().expand(6, -1, -1)
    again = teacher.predict(states.x_s.float(), states.s, states.k, cond, teacher.encode_texts([""]).half().float())
    torch.testing.assert_close(again.v_cond.half(), states.v_cond, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(again.v_uncond.half(), states.v_uncond, atol=2e-3, rtol=2e-3)
    for block, feature in record.features.by_block.items():
        torch.testing.assert_close(again.features[block].half(), feature, atol=4e-3, rtol=4e-3)


def test_states_lie_at_times_of_the_teachers_schedule(teacher: Teacher) -> None:
    bridge: Bridge = teacher.bridge
    for record in make_records(teacher, PROMPTS, KEYS, CONFIG):
        inside = record.states.s <= bridge.s_last
        assert torch.allclose(bridge.s_of_k(record.states.k)[inside].float(), record.states.s[inside])
        assert (record.states.k[~inside] == 999).all()


def test_x0_is_where_the_teachers_own_sampling_ends(teacher: Teacher) -> None:
    record = make_records(teacher, PROMPTS[:1], KEYS[:1], CONFIG)[0]
    chosen = draw_randomness(PROMPTS[0], CONFIG, (4, 8, 8))
    cond, uncond = teacher.encode_texts([PROMPTS[0].text]), teacher.encode_texts([""])

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        output = teacher.predict(x, s, teacher.bridge.nearest_state(s)[0], cond, uncond)
        return apply_guidance(output.v_cond, output.v_uncond, chosen.guidance_scale)

    grid = teacher.bridge.snap_grid(torch.cat([chosen.times, torch.zeros(1, dtype=torch.float64)]))
    x0 = euler(velocity, chosen.noise[None], grid)
    assert (x0[0] - record.x0.float()).square().mean() / x0.var() < 1e-4


def test_renoised_states_lie_on_the_straight_path_of_the_finished_picture(teacher: Teacher) -> None:
    record = make_records(teacher, PROMPTS, KEYS, CONFIG)[2]
    chosen = draw_randomness(PROMPTS[2], CONFIG, (4, 8, 8))
    for row, eps in zip((~record.states.trajectory).nonzero()[:, 0], chosen.renoised_noise, strict=True):
        s = record.states.s[row]
        expected = (1 - s) * record.x0.float() + s * eps
        torch.testing.assert_close(record.states.x_s[row].float(), expected, atol=2e-3, rtol=2e-3)


def test_the_same_prompts_give_the_same_bytes(teacher: Teacher) -> None:
    one, again = (make_records(teacher, PROMPTS, KEYS, CONFIG) for _ in range(2))
    assert [encode(record) for record in one] == [encode(record) for record in again]


@pytest.mark.parametrize(("field", "value"), [("guidance_max", 2.0), ("trajectory_states", 9)])
def test_impossible_states_are_refused_with_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        StatesConfig.model_validate({"steps": 8, field: value})
