"""Laws of straightness: closed forms of fields whose trajectories are known."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from stages.evaluate.paired import PairedInputs
from stages.evaluate.straightness import curvature_terms, relative_curvature
from stages.nets.teacher import Teacher
from stages.sampling.fields import TwoBranchField, teacher_field
from stages.sampling.grids import fixed_noises
from stages.sampling.sampler import Sampler


def field_of(speed: object) -> TwoBranchField:
    """v(x, s) = speed(s), the same for every value of x and for both branches."""

    def branches(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
        v = speed(s.float()).view(-1, 1, 1, 1).expand_as(x)
        return v, v

    return TwoBranchField(branches)


def inputs(count: int = 3) -> PairedInputs:
    return PairedInputs(torch.zeros(count, 2, 4), torch.zeros(1, 2, 4), fixed_noises(0, count, (4, 5, 6)))


def test_straight_lines_at_constant_speed_have_none() -> None:
    terms = curvature_terms(field_of(lambda s: torch.full_like(s, 3.0)), inputs(), Sampler(steps=7, guidance=1))
    assert terms[:, 0].tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert terms[:, 1].tolist() == pytest.approx([9, 9, 9], rel=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_straight_line_at_a_changing_speed_has_the_variance_of_the_speed(guidance: float) -> None:
    """v = 2 s: d = 1, and the integral of (2 s - 1)^2 is 1/3."""
    terms = curvature_terms(field_of(lambda s: 2 * s), inputs(), Sampler(steps=2000, guidance=guidance))
    assert relative_curvature(terms) == pytest.approx(1 / 3, rel=2e-3)


def test_the_number_is_that_of_the_teachers_own_trajectories(teacher: Teacher) -> None:
    """Followed by hand, step by step, from the same noise."""
    field, texts = teacher_field(teacher), ["a red star", "a blue ring"]
    task = PairedInputs(teacher.encode_texts(texts), teacher.uncond, fixed_noises(0, 2, (4, 8, 8)))
    sampler = Sampler(steps=5, guidance=3.0, batch_size=1)
    grid = field.snap_grid(torch.linspace(1, 0, 6, dtype=torch.float64))
    x, states = task.noise, []
    with torch.inference_mode():
        for s, following in pairwise(grid):
            v = field.velocity(x, s.expand(2), task.cond, task.uncond, 3.0)
            states.append((float(s - following), v))
            x = x - float(s - following) * v
    d = task.noise - x
    integral = sum(width * (v - d).square().flatten(1).mean(1).double() for width, v in states)
    expected = float(integral.mean() / d.square().flatten(1).mean(1).double().mean())
    assert relative_curvature(curvature_terms(field, task, sampler)) == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3
