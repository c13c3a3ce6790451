"""Laws of landings: they lie on the polyline of the teacher's guided sampling, and storing them moves nothing else."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.values import PictureSize
from shards.codec import encode
from shards.manifest import Recipe, differences
from shards.record import Landings, Record, tensors_of
from stages.cache.audit import landing_comparisons
from stages.cache.landings import landing_times, value_at
from stages.cache.plan import blank_record
from stages.cache.targets import (
    RenderConfig,
    StatesConfig,
    draw_randomness,
    make_records,
    recipe_of,
    records_from_pictures,
    windows_in,
)
from stages.flow.solver import apply_guidance
from stages.flow.windows import landing_velocity, window_ends
from stages.nets.components import load_components
from stages.nets.teacher import Teacher
from stages.prompts import GrammarSource, prompts

MODEL = "stages/tiny/model"
PROMPTS = prompts(GrammarSource(grammar=Path("stages/tiny/grammar.yaml")), 0, "train", 3)
KEYS = [f"{i:09d}" for i in range(3)]
STEPS = 9
ALL = StatesConfig(steps=STEPS, trajectory_states=STEPS, renoised_states=1, windows=4)
"""Every state of the sampling is kept, so that a test sees its whole polyline."""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components(MODEL, torch.device("cpu"), torch.float32), "hold")


@pytest.fixture(scope="module")
def records(teacher: Teacher) -> list[Record]:
    return make_records(teacher, PROMPTS, KEYS, ALL)


def landings_of(record: Record) -> Landings:
    assert record.landings is not None
    return record.landings


def velocities(record: Record) -> torch.Tensor:
    """The guided velocity at each stored state."""
    states = record.states
    return apply_guidance(states.v_cond.float(), states.v_uncond.float(), record.guidance_scale)


@pytest.mark.parametrize("windows", [1, 2, 4, 8])
def test_landings_lie_at_the_noise_and_the_inner_ends(teacher: Teacher, windows: int) -> None:
    config = ALL.model_copy(update={"windows": windows})
    for record, prompt in zip(make_records(teacher, PROMPTS, KEYS, config), PROMPTS, strict=True):
        landings = landings_of(record)
        assert landings.s.tolist() == torch.cat([torch.ones(1), window_ends(windows)[1:-1].float()]).tolist()
        assert (len(landings), landings.s.dtype, landings.x.dtype) == (windows, torch.float32, torch.float16)
        noise = draw_randomness(prompt, config, (4, 8, 8)).noise
        assert torch.equal(landings.x[0], noise.half())


@pytest.mark.parametrize("config", [ALL, StatesConfig(steps=2, trajectory_states=1, renoised_states=0, windows=8)])
@pytest.mark.parametrize("size", [None, PictureSize(96, 64)])
def test_storing_landings_moves_no_other_tensor(
    teacher: Teacher, config: StatesConfig, size: PictureSize | None
) -> None:
    without = config.model_copy(update={"windows": 0})
    for record, plain in zip(
        make_records(teacher, PROMPTS, KEYS, config, size),
        make_records(teacher, PROMPTS, KEYS, without, size),
        strict=True,
    ):
        assert (record.schema, plain.schema) == (3, 2)
        assert encode(replace(record, landings=None)) == encode(plain)


def test_every_landing_lies_on_the_line_between_two_states(records: list[Record]) -> None:
    for record in records:
        on = record.states.trajectory
        s, x = record.states.s[on], record.states.x_s[on].float()
        grid, points = torch.cat([s, torch.zeros(1)]), torch.cat([x, record.x0.float()[None]])
        for time, landing in zip(landings_of(record).s[1:], landings_of(record).x[1:].float(), strict=True):
            above = int((grid >= time).sum()) - 1
            share = (time - grid[above + 1]) / (grid[above] - grid[above + 1])
            between = share * points[above] + (1 - share) * points[above + 1]  # from both ends, without any velocity
            torch.testing.assert_close(landing, between, atol=4e-3, rtol=4e-3)


def test_going_on_from_a_landing_along_its_line_gives_the_same_picture(teacher: Teacher, records: list[Record]) -> None:
    uncond = teacher.encode_texts([""]).half().float()
    for record, prompt in zip(records, PROMPTS, strict=True):
        _, grid = teacher.bridge.nearest_state(draw_randomness(prompt, ALL, (4, 8, 8)).times)
        cond = record.cond.float()[None]

        def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            k, known = teacher.bridge.nearest_state(s[None])
            out = teacher.predict(x.half().float(), known.float(), k, cond, uncond)  # noqa: B023
            return apply_guidance(out.v_cond, out.v_uncond, record.guidance_scale)  # noqa: B023

        v_of_states = velocities(record)
        for time, landing in zip(landings_of(record).s, landings_of(record).x.float(), strict=True):
            before = int((grid >= time).sum()) - 1
            rest = [*grid[before + 1 :].tolist(), 0.0]
            x = landing + (rest[0] - time) * v_of_states[before]  # to the end of the line that the landing lies on
            x = x[None]
            for s, s_next in pairwise(rest):
                x = x + (s_next - s) * velocity(x, torch.tensor(s, dtype=torch.float64))
            error = (x[0] - record.x0.float()).square().mean() / record.x0.float().square().mean()
            assert error < 1e-4, (record.key, float(time))


def test_euler_on_the_windows_from_landing_to_landing_is_exact(records: list[Record]) -> None:
    for record in records:
        landings = landings_of(record)
        ends = torch.cat([landings.s, torch.zeros(1)])
        points = torch.cat([landings.x, record.x0[None]]).double()
        x = points[:1]
        for i, (s, end) in enumerate(pairwise(ends)):
            u = landing_velocity(points[i : i + 1], s[None], points[i + 1 : i + 2], end[None])
            x = x + (end - s) * u
        torch.testing.assert_close(x[0], record.x0.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("coarse", "fine"), [(1, 2), (2, 4), (4, 8), (1, 8)])
def test_the_landings_of_fewer_windows_are_among_those_of_more(teacher: Teacher, coarse: int, fine: int) -> None:
    few, many = (
        [landings_of(one) for one in make_records(teacher, PROMPTS, KEYS, ALL.model_copy(update={"windows": windows}))]
        for windows in (coarse, fine)
    )
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one.s, other.s[:: fine // coarse])
        assert torch.equal(one.x, other.x[:: fine // coarse])


@given(st.data())
def test_the_value_of_a_polyline_is_its_state_at_a_state_and_linear_between(data: st.DataObject) -> None:
    n, b = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    gaps = torch.rand(n, b, generator=generator, dtype=torch.float64) + 0.05
    s = 1 - (gaps.cumsum(0) - gaps[0]) / (gaps.sum(0) + 0.1)
    v = torch.randn(n, b, 2, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(1, b, 2, 3, generator=generator, dtype=torch.float64)
    for i in range(n - 1):
        x = torch.cat([x, x[-1:] + (s[i + 1] - s[i])[:, None, None] * v[i]])
    row = data.draw(st.integers(0, b - 1))
    for i in range(n):
        torch.testing.assert_close(value_at(float(s[i, row]), s, x, v)[row], x[i, row])
    share = data.draw(st.floats(0, 1))
    for i in range(n - 1):
        time = float(s[i, row] + share * (s[i + 1, row] - s[i, row]))
        expected = (1 - share) * x[i, row] + share * x[i + 1, row]
        torch.testing.assert_close(value_at(time, s, x, v)[row], expected)


def test_records_of_other_pictures_have_no_landings(teacher: Teacher) -> None:
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for record in records_from_pictures(teacher, PROMPTS, KEYS, x0, ALL):
        assert (record.landings, record.schema) == (None, 2)


def test_without_windows_a_recipe_is_the_one_of_earlier_versions(teacher: Teacher) -> None:
    def recipe(**states: object) -> Recipe:
        return recipe_of(teacher, RenderConfig(states=StatesConfig.model_validate({"steps": 8, **states})), {})

    plain, landed = recipe(), recipe(windows=4)
    render = plain.identity["render"]
    assert isinstance(render, dict)
    assert render["states"] == StatesConfig(steps=8).model_dump(mode="json", exclude={"windows"})
    assert (plain.schema_version, landed.schema_version, recipe(windows=0) == plain) == (2, 3, True)
    assert differences(plain, landed) == ["render.states.windows was absent, is now 4"]
    assert [windows_in(one) for one in (plain, landed, recipe(windows=8))] == [0, 4, 8]
    chosen = RenderConfig(states=StatesConfig(windows=8))
    renders = [(RenderConfig(), None), (RenderConfig(), plain), (RenderConfig(), recipe(windows=2)), (chosen, plain)]
    assert [render.with_windows(existing).states.windows for render, existing in renders] == [4, 0, 2, 8]


@pytest.mark.parametrize("windows", [0, 1, 4, 8])
def test_a_blank_record_takes_as_much_as_a_real_one(teacher: Teacher, windows: int) -> None:
    config = ALL.model_copy(update={"windows": windows})
    real = make_records(teacher, PROMPTS[:1], KEYS[:1], config)[0]
    blank = blank_record(teacher, config.states_per_prompt, PictureSize(64, 64), windows)
    assert {name: values.shape for name, values in tensors_of(blank).items()} == {
        name: values.shape for name, values in tensors_of(real).items()
    }


@pytest.mark.parametrize("value", [3, -1, 16, 5, True, "four", 4.5])
def test_other_numbers_of_windows_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="windows"):
        StatesConfig.model_validate({"windows": value})


def ratios(teacher: Teacher, record: Record, config: StatesConfig = ALL) -> list[float]:
    return [one.error_ratio for one in landing_comparisons(teacher.bridge, record, config)]


def test_the_audit_passes_good_landings_with_a_wide_margin(teacher: Teacher, records: list[Record]) -> None:
    for record in records:
        assert len(ratios(teacher, record)) == 4
        assert max(ratios(teacher, record)) < 0.5


def test_the_audit_checks_the_landings_whose_state_is_stored(teacher: Teacher) -> None:
    config = ALL.model_copy(update={"trajectory_states": 3})
    checked = [ratios(teacher, record, config) for record in make_records(teacher, PROMPTS, KEYS, config)]
    assert all(1 <= len(one) <= 4 and max(one) < 0.5 for one in checked)
    assert sum(map(len, checked)) > len(checked)


def test_the_audit_detects_landings_that_are_not_of_the_record(teacher: Teacher, records: list[Record]) -> None:
    one, other = records[0], landings_of(records[1])
    own = landings_of(one)
    later = own.x.clone()
    v = velocities(one)
    for i, time in enumerate(own.s.tolist()):
        before = int((one.states.s[one.states.trajectory] >= time).sum()) - 1
        later[i] = (own.x[i].float() - 0.01 * v[before]).half()  # a hundredth of the whole way further on
    times = landing_times(4).float()
    broken = {
        "of another prompt": Landings(own.s, other.x),
        "further on": Landings(own.s, later),
        "in another order": Landings(own.s, own.x.flip(0)),
        "at other times": Landings(times - torch.tensor([0, 1e-3, 0, 0]), own.x),
        "fewer": Landings(own.s[:2], own.x[:2]),
    }
    for name, landings in broken.items():
        assert max(ratios(teacher, replace(one, landings=landings))) > 1, name
    assert max(ratios(teacher, replace(one, landings=None))) == float("inf")
    assert max(ratios(teacher, one, ALL.model_copy(update={"windows": 0}))) == float("inf")
    for i in range(4):
        x = own.x.clone()
        x[i] = later[i]
        assert max(ratios(teacher, replace(one, landings=Landings(own.s, x)))) > 1, i
