"""The table of solvers by name; a new one is a row of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor

from stages.flow import solver
from stages.flow.bridge import Bridge
from stages.flow.solver import VelocityField, expand_time
from stages.flow.windows import window_ends
from stages.nets.scheduler import flow_scheduler
from stages.nets.student import TIME_SCALE
from stages.sampling.fields import TwoBranchField

OdeSolver: TypeAlias = Callable[[VelocityField, Tensor], Tensor]
"""From noise [b c h w] at s = 1 to latents [b c h w]."""


def unipc(
    velocity: VelocityField, noise: Float[Tensor, "b c h w"], steps: int, shift: float
) -> Float[Tensor, "b c h w"]:
    """UniPC as exports ship it, with whole times 1000 s for the model, as in the stock pipeline."""
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, expand_time(float(t) / TIME_SCALE, x)), t, x).prev_sample
    return x


def ddim(
    velocity: VelocityField, noise: Float[Tensor, "b c h w"], steps: int, bridge: Bridge, scheduler: DDIMScheduler
) -> Float[Tensor, "b c h w"]:
    """DDIM on the discrete steps of a model on the VP path, through its linear field.

    x_vp = g x, and v = (sigma - alpha) x_vp + g v_vp with g = alpha + sigma (mathematics, section 1).
    """
    scheduler.set_timesteps(steps)
    x_vp = noise
    for k in scheduler.timesteps:
        s = float(bridge.s_of_k(k[None]))
        g = (s**2 + (1 - s) ** 2) ** -0.5
        v = velocity(x_vp / g, expand_time(s, x_vp))
        v_vp = (v - (2 * s - 1) * g * x_vp) / g
        x_vp = scheduler.step(v_vp, int(k), x_vp).prev_sample
    return x_vp


@dataclass(frozen=True)
class Solver:
    """A row of the table."""

    description: str
    make: Callable[[TwoBranchField, int, float], OdeSolver]
    """(field, steps, shift of the time grid) -> the solver."""
    obstacle: Callable[[TwoBranchField], str] = lambda field: ""
    """Why it cannot sample a field; empty where it can."""
    uses_shift: bool = True
    """Whether its times are a grid of s, which a shift moves; those of DDIM are the teacher's own."""


def _on_grid(solve: Callable[..., Tensor]) -> Callable[[TwoBranchField, int, float], OdeSolver]:
    """A solver of `stages.flow.solver` on the grid of the field."""
    return lambda field, steps, shift: partial(solve, grid=_time_grid(field, steps, shift))


def _time_grid(field: TwoBranchField, steps: int, shift: float) -> Tensor:
    """The ends of the field's windows, or else the uniform grid, moved to where the field can be evaluated."""
    if field.windows is None:
        return field.snap_grid(solver.uniform_grid(steps, shift))
    assert (steps, shift) == (field.windows, 1.0), "a student of few steps has one grid"
    return window_ends(field.windows)


def _make_unipc(_field: TwoBranchField, steps: int, shift: float) -> OdeSolver:
    return partial(unipc, steps=steps, shift=shift)


def _make_ddim(field: TwoBranchField, steps: int, _shift: float) -> OdeSolver:
    assert field.ddim_steps is not None
    bridge, scheduler = field.ddim_steps
    return partial(ddim, steps=steps, bridge=bridge, scheduler=scheduler)


def _of_students(field: TwoBranchField) -> str:
    if field.windows is not None:
        return "a student of few steps was trained for those of euler"
    return "" if field.continuous_time else "a teacher answers at its own steps only"


def _of_vp_models(field: TwoBranchField) -> str:
    return "" if field.ddim_steps is not None else "a model that answers with velocity has no discrete steps"


SOLVERS = {
    "euler": Solver("one call a step", _on_grid(solver.euler)),
    "heun": Solver("of order 2, two calls a step (students)", _on_grid(solver.heun), _of_students),
    "unipc": Solver("as stock diffusers samples an export (students)", _make_unipc, _of_students),
    "ddim": Solver("as stock diffusers samples teachers and v-prediction", _make_ddim, _of_vp_models, uses_shift=False),
}
"""Name -> solver. The choices of every option come from here, and so do their descriptions."""
SHIFTABLE = tuple(name for name, row in SOLVERS.items() if row.uses_shift)

if TYPE_CHECKING:
    SolverName: TypeAlias = str
    ShiftableSolverName: TypeAlias = str
else:
    SolverName = Literal[tuple(SOLVERS)]
    ShiftableSolverName = Literal[SHIFTABLE]


def describe_solvers(names: Iterable[str]) -> str:
    """The description of an option that takes one of these names."""
    return "; ".join(f"{name}: {SOLVERS[name].description}" for name in names)


def supported_solvers(field: TwoBranchField) -> tuple[str, ...]:
    """The names of the solvers that this field's model allows."""
    return tuple(name for name, row in SOLVERS.items() if not row.obstacle(field))
