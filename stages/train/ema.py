"""An exponential moving average of the weights whose decay is counted in samples."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from configs.values import Strict


class EmaConfig(Strict):
    """The profile of the average over past weights.

    half_life is plain exponential decay, counted in samples; power is EDM2's profile, whose width grows with the run.
    """

    profile: Literal["half_life", "power"] = Field(
        "half_life", description="importance of past weights: 2^-(age / half-life), or a power of the samples seen then"
    )
    half_life_samples: int = Field(
        8000, ge=1, description="half_life: samples after which a weight counts half in the average"
    )
    ramp_ratio: float = Field(
        0.05,
        gt=0,
        description="half_life: its upper limit as a share of the samples seen, so that the start is forgotten",
    )
    sigma_rel: float = Field(
        0.05, gt=0, lt=12**-0.5, description="power: deviation of the profile, as a share of all samples seen"
    )


def decay(config: EmaConfig, before: int, after: int) -> float:
    """The factor on the average while the samples seen rise from `before` to `after`.

    Both profiles have decay(a, b) decay(b, c) = decay(a, c), so they do not depend on the batch size.
    """
    if before <= 0:
        return 0.0
    if config.profile == "power":
        return _power_decay(gamma_of(config.sigma_rel), before, after)
    return _half_life_decay(config, before, after)


def _half_life_decay(config: EmaConfig, before: int, after: int) -> float:
    """2^-integral dn / h(n), with the half-life h(n) = min(half_life_samples, ramp_ratio n) (EDM's and EDM2's ramp).

    While it ramps up this is the power profile with gamma + 1 = log 2 / ramp_ratio.
    """
    half_life, turn = config.half_life_samples, config.half_life_samples / config.ramp_ratio
    ramped = math.log(min(after, turn) / before) / config.ramp_ratio if before < turn else 0.0
    steady = max(0.0, after - max(before, turn)) / half_life
    return float(2.0 ** -(ramped + steady))


def _power_decay(gamma: float, before: int, after: int) -> float:
    """(before / after)^(gamma + 1), of the profile n^gamma.

    Karras et al. 2024 (arXiv:2312.02696), section 3.1: their (1 - 1/t)^(gamma + 1), for a step of any size.
    """
    return float((before / after) ** (gamma + 1))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power profile whose deviation is this share of its length (same section, solved).

    sigma_rel^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1 is a cubic; its largest root is the one above 0.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Ema:
    """The average of a module's trained parameters, in their dtype: fp32."""

    def __init__(self, module: nn.Module) -> None:
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._names = tuple(trained)
        self._parameters: list[Tensor] = list(trained.values())
        self._averages: list[Tensor] = [parameter.detach().clone() for parameter in trained.values()]

    @torch.no_grad()
    def update(self, decay_factor: float) -> None:
        """average <- decay_factor average + (1 - decay_factor) weights."""
        torch._foreach_lerp_(self._averages, self._parameters, 1 - decay_factor)

    def tensors(self) -> dict[str, Tensor]:
        """Parameter name -> average, sharing memory with this object."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy averages that `tensors` returned."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(tensors[name])

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Overwrite the module's weights by the averages."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.copy_(average)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange the module's weights and the averages within the context; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._averages[i] = self._averages[i], parameter.data
