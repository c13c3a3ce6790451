"""How straight the trajectories of a field are: the integral of |v - (x_1 - x_0)|^2 over s (Liu et al. 2022).

It is 0 where every trajectory from noise x_1 to data x_0 is a straight line at constant speed, so that one step is
exact. Here it is relative to the mean of |x_1 - x_0|^2, and of the trajectories by Euler's method under guidance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.evaluate.paired import PairedInputs
from stages.sampling.fields import TwoBranchField
from stages.sampling.sampler import Sampler

MAX_PICTURES = 64
"""Trajectories that are measured, the first ones: their mean varies little."""


@dataclass(frozen=True)
class Straightness:
    """The relative curvature of each model's trajectories, 0 for straight lines."""

    pictures: int
    steps: Mapping[str, int]
    relative: Mapping[str, float]


def curvature_terms(field: TwoBranchField, inputs: PairedInputs, sampler: Sampler) -> Float[Tensor, "b 2"]:
    """Of each trajectory the integral of |v - d|^2 and |d|^2, d = x_1 - x_0; means over values, in float64.

    Because d is the mean of v over s, the first is the mean of |v|^2 minus |d|^2.
    """
    times: list[float] = []
    squares: list[Tensor] = []

    def record(x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor, guidance: float | Tensor) -> Tensor:
        v = field.velocity(x, s, cond, uncond, guidance)
        times.append(float(s[0]))
        squares.append(v.double().square().flatten(1).mean(1))
        return v

    one_batch = sampler.for_teacher.model_copy(update={"batch_size": len(inputs.noise)})
    x0 = inputs.sample(replace(field, guided=record, identity=None), one_batch)
    widths = torch.tensor(times, dtype=torch.float64) - torch.tensor([*times[1:], 0.0], dtype=torch.float64)
    displacement = (inputs.noise.double() - x0.double()).square().flatten(1).mean(1)
    mean_square = (torch.stack(squares, 1) * widths.to(x0.device)).sum(1)
    return torch.stack([(mean_square - displacement).clamp_min(0), displacement], 1)


def relative_curvature(terms: Float[Tensor, "b 2"]) -> float:
    """The mean of the first terms over that of the second."""
    curvature, displacement = terms.mean(0).tolist()
    return float(curvature / displacement)
