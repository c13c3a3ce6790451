import math
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from stages.flow.path import interpolate
from stages.flow.solver import apply_guidance, euler, heun, remove_guidance, uniform_grid

Solver: TypeAlias = Callable[..., Tensor]


def swing(x: Tensor, s: Tensor) -> Tensor:
    """dx/ds = x cos(3 s), solved by x(0) = x(1) exp(-sin(3) / 3)."""
    return x * torch.cos(3 * s)[:, None, None, None]


def error(solve: Solver, n: int) -> float:
    x = torch.full((2, 3, 4, 5), 2.0, dtype=torch.float64)
    return float((solve(swing, x, uniform_grid(n)) - x * math.exp(-math.sin(3) / 3)).abs().max())


@pytest.mark.parametrize(("solve", "order"), [(euler, 1), (heun, 2)])
def test_halving_the_step_shrinks_the_error_by_the_order(solve: Solver, order: int) -> None:
    assert math.log2(error(solve, 200) / error(solve, 400)) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("solve", [euler, heun])
def test_a_straight_path_is_solved_in_one_step(solve: Solver) -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    landed = solve(lambda x, s: eps - x0, eps, uniform_grid(1))
    torch.testing.assert_close(landed, x0)


def test_a_grid_goes_from_noise_to_data_and_a_shift_leans_it_to_noise() -> None:
    assert uniform_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = uniform_grid(4, shift=3.0)
    assert shifted[0] == 1
    assert shifted[-1] == 0
    assert (shifted[1:-1] > uniform_grid(4)[1:-1]).all()


@pytest.mark.parametrize("solve", [euler, heun])
def test_every_state_of_a_straight_trajectory_lies_on_the_path(solve: Solver) -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    evaluated: list[tuple[Tensor, Tensor]] = []

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        evaluated.append((s, x))
        return eps - x0

    grid = (1.0, 0.6, 0.0)
    evaluated.append((torch.zeros(2, dtype=torch.float64), solve(velocity, eps, grid)))
    assert {float(s[0]) for s, _ in evaluated} == set(grid)
    for s, x in evaluated:
        torch.testing.assert_close(x, interpolate(x0, eps, s))


def test_a_solver_keeps_the_type_of_the_state_and_passes_one_time_per_sample() -> None:
    times: list[Tensor] = []

    def note(x: Tensor, s: Tensor) -> Tensor:
        times.append(s)
        return x

    assert euler(note, torch.ones(2, 3, 4, 5), uniform_grid(2)).dtype == torch.float32
    assert [s.tolist() for s in times] == [[1.0, 1.0], [0.5, 0.5]]


def test_guidance_is_the_conditional_branch_at_one_and_the_other_at_zero() -> None:
    v_cond, v_uncond = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_guidance(v_cond, v_uncond, 1.0), v_cond)
    torch.testing.assert_close(apply_guidance(v_cond, v_uncond, 0.0), v_uncond)
    torch.testing.assert_close(apply_guidance(v_cond, v_uncond, 7.5), v_uncond + 7.5 * (v_cond - v_uncond))
    each = apply_guidance(v_cond, v_uncond, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(each, torch.stack([v_cond[0], v_uncond[1]]))


def test_remove_guidance_inverts_apply_guidance() -> None:
    v_cond, v_uncond, w = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.tensor([1.0, 7.5])
    torch.testing.assert_close(remove_guidance(apply_guidance(v_cond, v_uncond, w), v_uncond, w), v_cond)
