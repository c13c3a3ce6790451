"""The teacher's noise schedule, read from its scheduler_config.json and never from a library's default."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stages.system.refusal import Refused

MAX_STEPS = 100_000
"""More than any teacher has: a config with more is broken."""

PredictionType: TypeAlias = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Signal share abar_k of each step in float64, falling with k, and what the network predicts."""

    alpha_bar: Float[Tensor, " K"]
    prediction_type: PredictionType

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            _refuse_entry("prediction_type", self.prediction_type, "a teacher must predict epsilon or v_prediction")
        abar = self.alpha_bar
        falls = abar.ndim == 1 and len(abar) > 1 and bool((abar.diff() < 0).all())
        if abar.dtype != torch.float64 or not falls or not (float(abar[0]) <= 1 and float(abar[-1]) >= 0):
            raise Refused(
                "scheduler config: betas must lie between 0 and 1, for two steps or more - repair the teacher's folder"
            )
        if self.prediction_type == "epsilon" and self.has_zero_terminal_snr:
            raise Refused(
                "scheduler config: rescale_betas_zero_snr leaves no signal at the last step, of which an epsilon "
                "prediction says nothing - use a teacher with prediction_type v_prediction"
            )

    @property
    def steps(self) -> int:
        """Number of the teacher's steps: 1000 for Stable Diffusion."""
        return len(self.alpha_bar)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether no signal is left at the last step."""
        return float(self.alpha_bar[-1]) == 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler_config.json; a missing or unknown entry is refused by name."""
        abar = unscaled_alpha_bar(config)
        # schedulers that cannot rescale do not write this key, so a missing key means false
        rescale = config.get("rescale_betas_zero_snr", False)
        if rescale not in (None, False, True):
            _refuse_entry("rescale_betas_zero_snr", rescale, "it must be true or false")
        if rescale:
            abar = rescale_zero_terminal_snr(abar)
        return cls(abar, _prediction_type(config))


def unscaled_alpha_bar(config: Mapping[str, Any]) -> Float[Tensor, " K"]:
    """The signal shares of a config's betas, before `rescale_betas_zero_snr` changes them."""
    return torch.cumprod(1 - _betas(config), dim=0)


def _prediction_type(config: Mapping[str, Any]) -> PredictionType:
    # Stable Diffusion 1.5's own file was written by diffusers 0.6.0, before the key existed (PNDM got it in 0.10.0)
    if "prediction_type" not in config and _is_older_diffusers(config, (0, 10)):
        return "epsilon"
    prediction_type: PredictionType = _require_entry(config, "prediction_type")
    return prediction_type


def _is_older_diffusers(config: Mapping[str, Any], version: tuple[int, int]) -> bool:
    numbers = str(config.get("_diffusers_version", "")).split(".")[:2]
    return len(numbers) == 2 and all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) < version


def _betas(config: Mapping[str, Any]) -> Float[Tensor, " K"]:
    steps = _require_entry(config, "num_train_timesteps")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 2 <= steps <= MAX_STEPS:
        _refuse_entry("num_train_timesteps", steps, f"it must be a whole number from 2 to {MAX_STEPS}")
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or len(trained) != steps or not all(map(_is_number, trained)):
            _refuse_entry("trained_betas", trained, f"it must be a list of num_train_timesteps = {steps} numbers")
        return torch.tensor(trained, dtype=torch.float64)
    name = _require_entry(config, "beta_schedule")
    if not isinstance(name, str) or name not in _BETA_SCHEDULES:
        _refuse_entry("beta_schedule", name, f"known are {', '.join(_BETA_SCHEDULES)}")
    return _BETA_SCHEDULES[name](config, steps)


def _linear(config: Mapping[str, Any], steps: int) -> Tensor:
    return torch.linspace(
        _require_beta(config, "beta_start"), _require_beta(config, "beta_end"), steps, dtype=torch.float64
    )


def _scaled_linear(config: Mapping[str, Any], steps: int) -> Tensor:
    """Linear in the square root: latent diffusion's own."""
    start, end = math.sqrt(_require_beta(config, "beta_start")), math.sqrt(_require_beta(config, "beta_end"))
    return torch.linspace(start, end, steps, dtype=torch.float64) ** 2


def _squaredcos_cap_v2(config: Mapping[str, Any], steps: int) -> Tensor:
    """abar(t) = cos^2(pi/2 (t + .008) / 1.008), each beta at most .999 (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp_max(0.999)


_BETA_SCHEDULES: Mapping[str, Callable[[Mapping[str, Any], int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
}


def rescale_zero_terminal_snr(abar: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Shift and scale sqrt(abar) so that the last is zero and the first stays (Lin et al. 2023, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _require_entry(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise Refused(
            f"scheduler config: {key} is missing - add to the teacher's scheduler_config.json what it was trained with"
        )
    return config[key]


def _require_beta(config: Mapping[str, Any], key: str) -> float:
    value = _require_entry(config, key)
    if not _is_number(value) or not 0 < value < 1:
        _refuse_entry(key, value, "it must be a number between 0 and 1")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_entry(key: str, value: object, reason: str) -> None:
    shown = repr(value)
    raise Refused(f"scheduler config: {key} is {shown[:80]}{'...' * (len(shown) > 80)} - {reason}")
