"""The bridge between a discrete VP teacher and the linear path (mathematics, section 1).

With alpha = sqrt(abar_k), sigma = sqrt(1 - abar_k), g = alpha + sigma: the teacher's step k is the time
s_k = sigma / g, and a state x of the linear path is x g(s) to the teacher, g(s) = 1 / sqrt(s^2 + (1 - s)^2).
Coefficients are formed in float64, one for each sample; results have the type of x (float32 where x comes in half).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.flow.path import per_sample
from stages.flow.schedule import NoiseSchedule
from stages.system.refusal import Refused

TailPolicy: TypeAlias = Literal["hold", "faithful"]
"""The velocity beyond the teacher's last step; part of the recipe."""

TIME_TOLERANCE = 1e-6
"""Times this near to the teacher's last one are that one, because s is stored in float32."""


class LinearCombination(NamedTuple):
    """x_coefficient x + output_coefficient network_output; float64, one pair per sample."""

    x_coefficient: Float[Tensor, " b"]
    output_coefficient: Float[Tensor, " b"]


@dataclass(frozen=True)
class Bridge:
    """Converts between the linear path and the teacher's steps: times, network input, and velocity from raw output.

    The teacher knows times from s_0 to s_last only. Below s_0 step 0 is held. In the tail above s_last
    `hold` takes x0_hat of the last step on the unit-variance input x g(s), v = (x - x0_hat) / s;
    `faithful` is the straight line from x_1 = eps to eps / g_last: plain DDIM of the teacher, if s_last is on the grid.
    """

    schedule: NoiseSchedule
    tail: TailPolicy = "hold"

    def __post_init__(self) -> None:
        if self.tail not in get_args(TailPolicy):
            raise Refused(f"tail policy {self.tail!r} is not known - choose one of {', '.join(get_args(TailPolicy))}")

    @cached_property
    def s_table(self) -> Float[Tensor, " K"]:
        """s_k = sigma / (alpha + sigma) of every step, rising with k."""
        alpha, sigma = self.schedule.alpha_bar.sqrt(), (1 - self.schedule.alpha_bar).sqrt()
        return sigma / (alpha + sigma)

    @property
    def k_last(self) -> int:
        """The teacher's last step: 999 for Stable Diffusion."""
        return len(self.s_table) - 1

    @cached_property
    def s_last(self) -> float:
        """The time of the teacher's last step: 0.93596 for Stable Diffusion 1.5."""
        return float(self.s_table[-1])

    def s_of_k(self, k: Int[Tensor, " b"] | Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time of step k in float64: s_k itself at whole steps, linear in log(s / (1 - s)) between them."""
        k = k.double().clamp(0, self.k_last)
        table = self.s_table.to(k.device)
        below, above = k.floor().long(), k.ceil().long()
        between = torch.sigmoid(torch.lerp(_log_odds(table[below]), _log_odds(table[above]), k - below))
        return torch.where(below == above, table[below], between)

    def k_of_s(self, s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The fractional step of time s in float64, the inverse of `s_of_k`; held at the first and at the last step."""
        odds, target = _log_odds(self.s_table.to(s.device)), _log_odds(s.double())
        below = (torch.searchsorted(odds, target, right=True) - 1).clamp(0, self.k_last - 1)
        share = (target - odds[below]) / (odds[below + 1] - odds[below])
        return below + share.clamp(0, 1)

    def in_tail(self, s: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Whether s lies beyond the teacher's last step."""
        return s.double() > self.s_last + TIME_TOLERANCE

    def nearest_state(self, s: Float[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """The teacher's own state (k, s_k) nearest to s in log-odds; in the tail (k_last, s).

        Nothing is interpolated at such a state. The time comes back in float64; below s_0 it is s_0.
        """
        k = self.k_of_s(s).round().long()
        return k, torch.where(self.in_tail(s), s.double(), self.s_of_k(k))

    def snap_grid(self, grid: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """A sampler's grid, its inner times moved to the teacher's states; ends are kept, repeated times dropped."""
        _, inner = self.nearest_state(grid[1:-1])
        times = torch.cat([grid[:1].double(), inner, grid[-1:].double()])
        return times[torch.cat([times.new_ones(1).bool(), times.diff() != 0])]

    def teacher_input(self, x: Float[Tensor, "b ..."], s: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
        """The network's input for the state x of the linear path: x g(s), of unit variance for unit data."""
        return per_sample(_variance_scale(s.double()), x) * x

    def velocity(
        self,
        x: Float[Tensor, "b ..."],
        s: Float[Tensor, " b"],
        k: Int[Tensor, " b"],
        network_output: Float[Tensor, "b ..."],
    ) -> Float[Tensor, "b ..."]:
        """The velocity at (x, s) from the raw `network_output` for `teacher_input(x, s)` at step k, whole or not."""
        coefficients = self._velocity_coefficients(s.double(), k)
        x_coefficient, output_coefficient = (per_sample(one, x) for one in coefficients)
        return x_coefficient * x + output_coefficient * network_output

    def _velocity_coefficients(self, s: Tensor, k: Tensor) -> LinearCombination:
        x0_hat, eps_hat = self._x0_eps_coefficients(s, k)
        # At s_last both are the same number, and (x - x0_hat) / s is finite even where s_last = 1 (zero terminal SNR).
        late = s > self.s_last - TIME_TOLERANCE
        x_coefficient = torch.where(late, (1 - x0_hat.x_coefficient) / s, (eps_hat.x_coefficient - 1) / (1 - s))
        output_coefficient = torch.where(late, -x0_hat.output_coefficient / s, eps_hat.output_coefficient / (1 - s))
        if self.tail == "faithful":
            tail = self.in_tail(s)
            x_coefficient = torch.where(tail, self._faithful_tail_coefficient(s), x_coefficient)
            output_coefficient = output_coefficient.masked_fill(tail, 0)
        return LinearCombination(x_coefficient, output_coefficient)

    def _x0_eps_coefficients(self, s: Tensor, k: Tensor) -> tuple[LinearCombination, LinearCombination]:
        """x0_hat and eps_hat of the teacher's output for x g(s), read as its state at step k."""
        s_k, g = self.s_of_k(k), _variance_scale(s)
        alpha, sigma = (1 - s_k) * _variance_scale(s_k), s_k * _variance_scale(s_k)
        if self.schedule.prediction_type == "epsilon":
            eps_hat = LinearCombination(torch.zeros_like(s), torch.ones_like(s))
            return LinearCombination(g / alpha, -sigma / alpha), eps_hat
        return LinearCombination(alpha * g, -sigma), LinearCombination(sigma * g, alpha)

    def _faithful_tail_coefficient(self, s: Tensor) -> Tensor:
        """v / x on the line from x_1 = eps to eps / g_last: the slope over the height."""
        # Slope (1 - foot) / width over height foot + (1 - foot) (s - s_last) / width; width is 0 without a tail.
        foot, width = 1 / float(_variance_scale(self.s_table[-1])), 1 - self.s_last
        return (1 - foot) / (foot * width + (1 - foot) * (s - self.s_last))


def x0_from_velocity(
    x: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], s: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The data end of the straight line through x: x0_hat = x - s v."""
    return x - per_sample(s, x) * v


def _variance_scale(s: Tensor) -> Tensor:
    return 1 / torch.sqrt(s**2 + (1 - s) ** 2)


def _log_odds(s: Tensor) -> Tensor:
    """log(s / (1 - s)), kept finite at the ends."""
    return torch.logit(s, eps=1e-12)
