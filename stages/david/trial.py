"""Metrics of a fitted block model on held-out prompts, its responses to perturbed features, and its calibration."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from configs.values import Stored
from stages.david.assessment import assess_block, reduce, soft_targets
from stages.david.block_model import BlockModel
from stages.david.patterns import BlockStates, PatternSpace

NOISE_LEVELS = (0.3, 0.5, 1.0)
CALIBRATION_BINS = 15
NEIGHBOUR_BINS = 2

ErrorTriple = tuple[float, float, float]
"""Timestep error, pattern error, 1 - coherence."""

TABLE_HEADER = (
    "block      exact within2 chance | calibration error: soft within2 | pattern acc use | "
    "response (e_t e_p 1-coh) at .3 .5 1 sd | content shuffled | time shuffled | all shuffled | s"
)


class FitMetrics(Stored):
    """One block's metrics on prompts used neither to train nor to tune."""

    exact: float
    """share of the states whose likeliest bin is the true one"""
    within_two: float
    """the same, up to two bins away"""
    chance: float
    """`within_two` of the best constant prediction"""
    soft_calibration: float
    """expected calibration error against the fit's soft targets q: the likeliest bin's confidence against its q"""
    calibration: float
    """expected calibration error: mass within two bins of the likeliest against how often the true bin lies there; the
    blur of q makes a perfect model a little underconfident"""
    pattern_accuracy: float
    pattern_use: float
    """entropy of the patterns' shares over its maximum"""
    noise: tuple[ErrorTriple, ...]
    """responses to noise of .3, .5 and 1 deviation of each channel"""
    content_shuffled: ErrorTriple
    """each state with the features of another one in its bin"""
    time_shuffled: ErrorTriple
    """each state with the features of another one of its prompt"""
    shuffled: ErrorTriple
    """each state with the features of any other"""

    def table_row(self, block: str, seconds: float) -> str:
        """One row of the table for the user."""
        accuracies = f"{self.exact:5.3f} {self.within_two:7.3f} {self.chance:6.3f}"
        calibration = f"{self.soft_calibration:5.3f} {self.calibration:5.3f}"
        patterns = f"{self.pattern_accuracy:5.3f} {self.pattern_use:5.3f}"
        responses = [*self.noise, self.content_shuffled, self.time_shuffled, self.shuffled]
        errors = " | ".join(" ".join(f"{value:.3f}" for value in response) for response in responses)
        return f"{block:10} {accuracies} | {calibration} | {patterns} | {errors} | {seconds:.1f}"


@torch.no_grad()
def evaluate_fit(block_model: BlockModel, states: BlockStates, space: PatternSpace, seed: int) -> FitMetrics:
    """All metrics of a block model on `states`."""
    x, bins, generator = states.features, states.bins, torch.Generator().manual_seed(seed)
    posterior, targets = block_model(x, bins), soft_targets(bins, len(block_model.reliability))
    labels = space.label(block_model.standardise(x), states.s)
    predicted = posterior.log_bins.argmax(dim=1)
    near = (predicted - bins).abs() <= NEIGHBOUR_BINS
    confidence = posterior.log_bins.exp().amax(dim=1)

    def shuffled(rows: Int[Tensor, " m"]) -> ErrorTriple:
        return perturbation_errors(block_model, x[rows], x, bins)

    return FitMetrics(
        exact=float((predicted == bins).float().mean()),
        within_two=float(near.float().mean()),
        chance=float(neighbour_mass(torch.bincount(bins, minlength=targets.shape[1]).float()).max() / len(bins)),
        soft_calibration=calibration_error(confidence, targets.gather(1, predicted[:, None]).squeeze(1)),
        calibration=calibration_error(
            neighbour_mass(posterior.log_bins.exp()).gather(1, predicted[:, None]).squeeze(1), near.float()
        ),
        pattern_accuracy=float((posterior.log_patterns.argmax(dim=1) == labels).float().mean()),
        pattern_use=normalised_entropy(labels, posterior.log_patterns.shape[1]),
        noise=tuple(
            perturbation_errors(block_model, add_noise(block_model, x, size, generator), x, bins)
            for size in NOISE_LEVELS
        ),
        content_shuffled=shuffled(shuffle_within(bins, generator)),
        time_shuffled=shuffled(shuffle_within(states.key, generator)),
        shuffled=shuffled(torch.randperm(len(x), generator=generator)),
    )


def perturbation_errors(
    block_model: BlockModel, perturbed: Float[Tensor, "m n"], features: Float[Tensor, "m n"], bins: Int[Tensor, " m"]
) -> ErrorTriple:
    """e_t, e_p and 1 - coherence of perturbed features in place of the teacher's."""
    targets = soft_targets(bins, len(block_model.reliability))
    assessed = assess_block(block_model(perturbed, bins), block_model(features, bins), bins, targets)
    mean = reduce({"": assessed}, targets.shape[1])
    return float(mean.timestep_error), float(mean.pattern_error), float(1 - mean.coherence)


def add_noise(
    block_model: BlockModel,
    features: Float[Tensor, "m n"],
    noise_level: float | Float[Tensor, "m 1"],
    generator: torch.Generator,
) -> Float[Tensor, "m n"]:
    """Features with noise of `noise_level` deviations of each channel."""
    return features + noise_level * block_model.deviation * torch.randn(features.shape, generator=generator)


def shuffle_within(groups: Int[Tensor, " m"], generator: torch.Generator) -> Int[Tensor, " m"]:
    """A permutation of the rows that moves each one to the place of another of its group, where it has another."""
    mixed = torch.randperm(len(groups), generator=generator)
    mixed = mixed[groups[mixed].argsort(stable=True)]
    _, sizes = groups.unique(return_counts=True)
    turned = torch.cat([part.roll(1) for part in mixed.split(sizes.tolist())])
    permutation = torch.empty_like(mixed)
    permutation[mixed] = turned
    return permutation


def neighbour_mass(masses: Float[Tensor, "... T"]) -> Float[Tensor, "... T"]:
    """For each bin the sum over the bins at most two away."""
    return F.pad(masses, (NEIGHBOUR_BINS, NEIGHBOUR_BINS)).unfold(-1, 2 * NEIGHBOUR_BINS + 1, 1).sum(-1)


def calibration_error(confidence: Float[Tensor, " m"], truth: Float[Tensor, " m"]) -> float:
    """Expected calibration error: |mean confidence - mean truth| in 15 equal classes of confidence, weighted."""
    classes = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
    gaps = torch.bincount(classes, (confidence - truth).double(), minlength=CALIBRATION_BINS)
    return float(gaps.abs().sum() / len(confidence))


def normalised_entropy(labels: Int[Tensor, " m"], count: int) -> float:
    """Entropy of the labels' shares over its maximum."""
    shares = torch.bincount(labels, minlength=count) / len(labels)
    return float(torch.special.entr(shares).sum() / math.log(count))


TEMPERATURE_FACTORS = torch.logspace(-0.5, 0.5, 101)
"""Candidate temperatures, as multiples of the fitted one: from a third to three times."""
REFERENCE_NOISE = 0.5


@torch.no_grad()
def tune(block_model: BlockModel, states: BlockStates, space: PatternSpace, seed: int) -> None:
    """Scale both temperatures to the best likelihood on `states`; measure reliability and reference responses."""
    labels = space.label(block_model.standardise(states.features), states.s)
    count, patterns = len(block_model.reliability), len(block_model.patterns.vertices)
    posterior = block_model(states.features, states.bins)
    block_model.bins.temperature.mul_(best_factor(posterior.log_bins, soft_targets(states.bins, count)))
    block_model.patterns.temperature.mul_(best_factor(posterior.log_patterns, F.one_hot(labels, patterns).float()))

    block_model.reliability.copy_(reliability(posterior.log_bins.argmax(dim=1), states.bins, count))
    generator = torch.Generator().manual_seed(seed)
    noise = add_noise(block_model, states.features, REFERENCE_NOISE, generator)
    block_model.reference.copy_(torch.tensor(perturbation_errors(block_model, noise, states.features, states.bins)))


def best_factor(log_posterior: Float[Tensor, "m K"], targets: Float[Tensor, "m K"]) -> Tensor:
    """The factor of the temperature that gives the smallest cross-entropy to `targets`."""
    costs = [
        -(targets * torch.log_softmax(log_posterior / factor, dim=1)).sum(dim=1).mean()
        for factor in TEMPERATURE_FACTORS
    ]
    return TEMPERATURE_FACTORS[torch.stack(costs).argmin()]


def reliability(predicted_bins: Int[Tensor, " m"], bins: Int[Tensor, " m"], count: int) -> Float[Tensor, " T"]:
    """Share of predictions within one bin of the truth, per bin; the share of all bins counts as one more state."""
    near = ((predicted_bins - bins).abs() <= 1).float()
    hits, count_per_bin = torch.bincount(bins, near, minlength=count), torch.bincount(bins, minlength=count)
    return ((hits + near.mean()) / (count_per_bin + 1)).float()
