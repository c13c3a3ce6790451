"""What a teacher's network predicts, measured from its answers (mathematics.md section 1b)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from stages.flow.bridge import Bridge
from stages.flow.schedule import NoiseSchedule, rescale_zero_terminal_snr, unscaled_alpha_bar
from stages.nets.components import Components
from stages.nets.tokens import PROBE_SENTENCE
from stages.system.device import one_thread
from stages.teacher_files.folder import read_json

Hypothesis: TypeAlias = Literal["epsilon", "v_prediction", "v_prediction, zero SNR", "sample"]
Network: TypeAlias = Callable[[Tensor, int, Tensor], Tensor]
"""(x [b, c, h, w], step, conditioning [b, l, d]) -> the network's answer."""

SIGNAL_FACTORS = (0.6, 0.45, 0.35, 0.25, 0.15)
"""The steps that are measured: where alpha falls to these, and the last. In between an error of the network counts
little: training leaves errors of the noise of about .01, and v of an epsilon network is 1 / alpha times as wrong."""
MAX_SIDE = 32
"""Of the latents, to be cheap; slopes of the finest detail hardly depend on the size."""
FINE_VALUES = 2048
"""Values of finest detail at each step, at least."""
SAMPLING_STEPS = 12
NOMINAL_FINE_VARIANCE = 0.2
"""Of the data's finest detail, about that of an SD-1.x latent, where it need not be measured."""
MAX_FINE_VARIANCE = 0.5
MAX_DEVIATION = 0.2
"""Of slopes from those of a hypothesis; untrained networks have about 0, which is .3 from v and .9 from epsilon."""
MAX_DEVIATION_RATIO = 0.65
"""Of the best hypothesis to the second best."""
DETAIL_ERROR, NOISE_ERROR, SLOPE_ERROR = 0.4, 0.003, 0.01
"""Standard errors of a v network's slopes: of the part that depends on the variance of detail, of which coarser detail
tells more at less noisy steps; of the noise that the teacher of a v network was wrong by, which v has 1 / alpha times;
and of any slope."""
MAX_SIGNAL_SHARE = 0.25
"""Steps with more are not counted for the schedules: there coarse detail tells most of the finest."""
MAX_MEAN_SQUARE, MIN_DIFFERENCE = 2.0, 3.0
"""Of errors in these units: the mean square of the better schedule, and by how much the sum of the other is larger."""
MIN_SCHEDULE_DISTANCE = 0.02
"""Schedules whose slopes differ less are one."""
MIN_IDENTITY = 0.7
"""Correlation of input and answer at the first step, where a prediction of the data has to be the input."""


@dataclass(frozen=True)
class MeasuredPrediction:
    """The slopes of a network's answers on its noise, those that each hypothesis expects, and the verdict."""

    steps: tuple[int, ...]
    slopes: tuple[float, ...]
    expected: Mapping[Hypothesis, tuple[float, ...]]
    deviations: Mapping[Hypothesis, float]
    """Root mean square over the steps."""
    fine_variance: float
    """Of the finest detail of the data, on which the expected slopes depend."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None
    """None where the answers are those of no trained network."""
    zero_terminal_snr: bool | None
    """None where it cannot be seen."""

    schedule_misfits: tuple[float, float] | None = None
    """Of a v network: sum of squares of the slopes' distances from both schedules, in standard errors."""

    @property
    def verdict(self) -> str:
        """What was measured, in words."""
        if self.prediction_type is None:
            return "undecided: its answers are like no trained model's"
        ending = {True: ", zero terminal SNR", False: "", None: ", terminal SNR undecided"}[self.zero_terminal_snr]
        return self.prediction_type + (ending if self.prediction_type == "v_prediction" else "")

    @property
    def text(self) -> str:
        """The verdict with its figures, on one line."""
        return f"{self.verdict} ({self.figures})"

    def table(self) -> list[str]:
        """Steps, slopes and expected slopes as lines."""
        rows: list[tuple[str, Sequence[float], str]] = [("measured", self.slopes, "")]
        rows += [(name, values, f"{self.deviations[name]:.3f}") for name, values in self.expected.items()]
        lines = [f"{'step':24}" + "".join(f"{step:>8}" for step in self.steps) + f"{'deviation':>11}"]
        return lines + [
            f"{name:24}" + "".join(f"{x:8.3f}" for x in values) + f"{end:>11}" for name, values, end in rows
        ]

    @property
    def figures(self) -> str:
        """Slopes, and how far they are from each hypothesis."""
        slopes = " ".join(f"{slope:.2f}" for slope in self.slopes)
        deviations = ", ".join(f"{name} by {value:.3f}" for name, value in self.deviations.items())
        text = f"slopes {slopes} at steps {' '.join(map(str, self.steps))} deviate from {deviations}"
        if self.schedule_misfits is None:
            return text
        plain, zero = self.schedule_misfits
        return f"{text}; in standard errors, squared: {plain:.1f} with signal at the end, {zero:.1f} without"


@torch.inference_mode()
def measure_prediction(components: Components) -> MeasuredPrediction:
    """What the network of a loaded teacher predicts, whatever its config states."""
    unet: Any = components.unet
    tokens = components.tokenizer(["", PROBE_SENTENCE], padding="max_length", truncation=True, return_tensors="pt")
    cond = components.text_encoder(tokens.input_ids.to(unet.device)).last_hidden_state

    def network(x: Tensor, k: int, rows: Tensor) -> Tensor:
        answer: Tensor = unet(x.to(unet.device, unet.dtype), torch.tensor(k, device=unet.device), rows).sample
        return answer.float().cpu()

    config = read_json(components.folder / "scheduler" / "scheduler_config.json")
    channels, height, _ = components.latent_shape()
    side = max(8, min(height, MAX_SIDE) // 8 * 8)
    with one_thread() if unet.device.type == "cpu" and side < MAX_SIDE else torch.inference_mode():
        return measure_network(network, cond, (channels, side, side), unscaled_alpha_bar(config))


def measure_network(
    network: Network, cond: Float[Tensor, "2 l d"], shape: tuple[int, int, int], alpha_bar: Float[Tensor, " K"]
) -> MeasuredPrediction:
    """The same of any network under two conditionings; `alpha_bar` is its schedule without rescaling."""
    steps = measured_steps(alpha_bar)
    fine_values = shape[0] * shape[1] * shape[2] // 4
    cond = cond.repeat(max(1, -(-FINE_VALUES // (2 * fine_values))), 1, 1)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        """Each noise under one conditioning and its negative under the other, so that what is constant cancels."""
        half = torch.randn(len(cond) // 2, *shape, generator=generator)
        return torch.stack([half, -half], dim=1).flatten(0, 1)

    measured = [fine_slope(network(x, k, cond), x) for k, x in ((k, noise()) for k in steps)]
    slopes, errors = (tuple(column) for column in zip(*measured, strict=True))
    schedules = {"": alpha_bar, "zero": rescale_zero_terminal_snr(alpha_bar)}

    def expectations(fine_variance: float) -> dict[Hypothesis, tuple[float, ...]]:
        return {
            "epsilon": expected_slopes("epsilon", alpha_bar[list(steps)], fine_variance),
            "v_prediction": expected_slopes("v_prediction", alpha_bar[list(steps)], fine_variance),
            "v_prediction, zero SNR": expected_slopes("v_prediction", schedules["zero"][list(steps)], fine_variance),
            "sample": expected_slopes("sample", alpha_bar[list(steps)], fine_variance),
        }

    fine_variance = NOMINAL_FINE_VARIANCE
    expected = expectations(fine_variance)
    kind = prediction_type_of(slopes, expected)
    zero: bool | None = False
    misfits = None
    if kind == "sample" and first_step_correlation(network, noise(), cond) < MIN_IDENTITY:
        kind = None
    if kind == "v_prediction":
        sampled = float(fine_band(sample_v(network, noise(), cond, alpha_bar)).var())
        fine_variance = min(MAX_FINE_VARIANCE, (sampled * NOMINAL_FINE_VARIANCE) ** 0.5)  # as uncertain as each other
        expected = expectations(fine_variance)
        misfits = schedule_misfits(slopes, errors, expected, alpha_bar[list(steps)])
        zero = zero_terminal_snr_of(misfits, expected)
    deviations = {name: _deviation(slopes, values) for name, values in expected.items()}
    zero = zero if kind else None
    return MeasuredPrediction(steps, slopes, expected, deviations, fine_variance, kind, zero, misfits)


def measured_steps(alpha_bar: Float[Tensor, " K"]) -> tuple[int, ...]:
    """The steps of `SIGNAL_FACTORS` and the last, each once, rising."""
    last = len(alpha_bar) - 1
    found = [int((alpha_bar.sqrt() > factor).sum()) for factor in SIGNAL_FACTORS]
    return tuple(sorted({min(k, last) for k in found} | {last}))


def expected_slopes(
    kind: Literal["epsilon", "v_prediction", "sample"], alpha_bar: Float[Tensor, " n"], fine_variance: float
) -> tuple[float, ...]:
    """Slopes of the best answers on x, for detail of this variance that no other detail tells (Wiener's filter)."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x0 = alpha * fine_variance / (alpha_bar * fine_variance + sigma**2)
    slopes = {"epsilon": (1 - alpha * x0) / sigma, "v_prediction": (alpha - x0) / sigma, "sample": x0}[kind]
    return tuple(slopes.tolist())


def fine_band(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """The finest detail: the diagonal differences of blocks of 2 x 2 (Haar), of unit variance for white noise."""
    return (x[..., 0::2, 0::2] - x[..., 0::2, 1::2] - x[..., 1::2, 0::2] + x[..., 1::2, 1::2]) / 2


def fine_slope(answer: Tensor, x: Tensor) -> tuple[float, float]:
    """<answer, x> / <x, x> over the finest detail, and its standard error."""
    answer, x = fine_band(answer), fine_band(x)
    slope = (answer * x).sum() / (x * x).sum()
    return float(slope), float((answer - slope * x).norm() / x.norm() / x.numel() ** 0.5)


def prediction_type_of(
    slopes: Sequence[float], expected: Mapping[Hypothesis, Sequence[float]]
) -> Literal["epsilon", "v_prediction", "sample"] | None:
    """The prediction type whose slopes are clearly the nearest; None where none is near enough."""
    by = {name: _deviation(slopes, values) for name, values in expected.items()}
    kinds: dict[Literal["epsilon", "v_prediction", "sample"], float] = {
        "epsilon": by["epsilon"],
        "v_prediction": min(by["v_prediction"], by["v_prediction, zero SNR"]),
        "sample": by["sample"],
    }
    best, second = sorted(kinds, key=lambda kind: kinds[kind])[:2]
    clear = kinds[best] <= MAX_DEVIATION and kinds[best] <= MAX_DEVIATION_RATIO * kinds[second]
    return best if clear else None


def schedule_misfits(
    slopes: Sequence[float],
    errors: Sequence[float],
    expected: Mapping[Hypothesis, Sequence[float]],
    alpha_bar: Float[Tensor, " n"],
) -> tuple[float, float]:
    """Squared distances of a v network's slopes from those of the schedule as it is and rescaled, in standard errors.

    `errors` are those of the slopes' measurement, to which the network's own are added.
    """
    detail = expected["sample"]  # the part of a slope that is the answer's x0
    weights = [
        1 / (error**2 + (DETAIL_ERROR * x0) ** 2 + NOISE_ERROR**2 / max(share, 1e-6) + SLOPE_ERROR**2)
        if share <= MAX_SIGNAL_SHARE
        else 0.0
        for error, x0, share in zip(errors, detail, alpha_bar.tolist(), strict=True)
    ]

    def misfit(curve: Sequence[float]) -> float:
        squares = [(slope - value) ** 2 for slope, value in zip(slopes, curve, strict=True)]
        return sum(square * weight for square, weight in zip(squares, weights, strict=True))

    return misfit(expected["v_prediction"]), misfit(expected["v_prediction, zero SNR"])


def zero_terminal_snr_of(misfits: tuple[float, float], expected: Mapping[Hypothesis, Sequence[float]]) -> bool | None:
    """Which of its two schedules a v network answers by: the one whose slopes fit much better, if they fit."""
    plain, zero = misfits
    steps = len(expected["v_prediction"])
    distinct = _deviation(expected["v_prediction"], expected["v_prediction, zero SNR"]) >= MIN_SCHEDULE_DISTANCE
    fits = min(plain, zero) <= MAX_MEAN_SQUARE * steps
    return zero < plain if distinct and fits and abs(plain - zero) >= MIN_DIFFERENCE else None


def sample_v(network: Network, x: Tensor, cond: Tensor, alpha_bar: Float[Tensor, " K"]) -> Tensor:
    """Data from noise by a v network on a schedule: the method of Adams and Bashforth of order 2 on the linear path.

    Euler's method would lose a third of the variance of the finest detail in as many steps.
    """
    bridge = Bridge(NoiseSchedule(alpha_bar, "v_prediction"))
    grid = torch.linspace(bridge.k_last, 0, SAMPLING_STEPS).round().long().tolist()
    times = [*bridge.s_table[grid].tolist(), 0.0]
    x, earlier, before = x.double() * (times[0] ** 2 + (1 - times[0]) ** 2) ** 0.5, None, 1.0
    for k, (s, following) in zip(grid, pairwise(times), strict=True):
        rows = torch.full((len(x),), s, dtype=torch.float64)
        answer = network(bridge.teacher_input(x, rows).float(), k, cond)
        v = bridge.velocity(x, rows, torch.full((len(x),), k), answer.double())
        step = following - s
        x = x + step * (v if earlier is None else v + step / (2 * before) * (v - earlier))
        earlier, before = v, step
    return x.float()


def first_step_correlation(network: Network, x: Tensor, cond: Tensor) -> float:
    """Of input and answer at the first step, which has hardly any noise."""
    answer = network(x, 0, cond)
    return float((answer * x).sum() / (answer.norm() * x.norm()))


def _deviation(slopes: Sequence[float], expected: Sequence[float]) -> float:
    squares = [(slope - value) ** 2 for slope, value in zip(slopes, expected, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)
