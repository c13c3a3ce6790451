"""David on trial: how well he reads the teacher's own features, and how he answers when they are spoilt.

What a fitted companion learns from prompts that did not teach him: how sure to be, and how far to trust himself.
"""

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
    """One block's marks on prompts that neither taught nor tuned."""

    exact: float
    """share of the states whose likeliest bin is the true one"""
    within_two: float
    """the same, up to two bins away"""
    chance: float
    """`within_two` of the best answer that is always the same"""
    soft_calibration: float
    """expected calibration error of what was fitted, a posterior over bins blurred by q: the likeliest bin's confidence
    against the share that q gives it"""
    calibration: float
    """expected calibration error: mass within two bins of the likeliest against how often the true bin lies there; the
    blur makes a perfect reader seem a little too modest"""
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
        """The same for a person."""
        marks = f"{self.exact:5.3f} {self.within_two:7.3f} {self.chance:6.3f}"
        calibration = f"{self.soft_calibration:5.3f} {self.calibration:5.3f}"
        patterns = f"{self.pattern_accuracy:5.3f} {self.pattern_use:5.3f}"
        spoilt = [*self.noise, self.content_shuffled, self.time_shuffled, self.shuffled]
        told = " | ".join(" ".join(f"{value:.3f}" for value in response) for response in spoilt)
        return f"{block:10} {marks} | {calibration} | {patterns} | {told} | {seconds:.1f}"


@torch.no_grad()
def evaluate_fit(block_model: BlockModel, states: BlockStates, space: PatternSpace, seed: int) -> FitMetrics:
    """Every mark of a companion on `states`."""
    x, bins, generator = states.features, states.bins, torch.Generator().manual_seed(seed)
    said, targets = block_model(x, bins), soft_targets(bins, len(block_model.reliability))
    labels = space.label(block_model.standardise(x), states.s)
    answer = said.log_bins.argmax(dim=1)
    near = (answer - bins).abs() <= NEIGHBOUR_BINS
    confidence = said.log_bins.exp().amax(dim=1)

    def answered(rows: Int[Tensor, " m"]) -> ErrorTriple:
        return perturbation_errors(block_model, x[rows], x, bins)

    return FitMetrics(
        exact=float((answer == bins).float().mean()),
        within_two=float(near.float().mean()),
        chance=float(neighbour_mass(torch.bincount(bins, minlength=targets.shape[1]).float()).max() / len(bins)),
        soft_calibration=calibration_error(confidence, targets.gather(1, answer[:, None]).squeeze(1)),
        calibration=calibration_error(
            neighbour_mass(said.log_bins.exp()).gather(1, answer[:, None]).squeeze(1), near.float()
        ),
        pattern_accuracy=float((said.log_patterns.argmax(dim=1) == labels).float().mean()),
        pattern_use=normalised_entropy(labels, said.log_patterns.shape[1]),
        noise=tuple(
            perturbation_errors(block_model, add_noise(block_model, x, size, generator), x, bins)
            for size in NOISE_LEVELS
        ),
        content_shuffled=answered(shuffle_within(bins, generator)),
        time_shuffled=answered(shuffle_within(states.key, generator)),
        shuffled=answered(torch.randperm(len(x), generator=generator)),
    )


def perturbation_errors(
    block_model: BlockModel, perturbed: Float[Tensor, "m n"], features: Float[Tensor, "m n"], bins: Int[Tensor, " m"]
) -> ErrorTriple:
    """The three numbers, as errors, for spoilt features in place of the teacher's."""
    targets = soft_targets(bins, len(block_model.reliability))
    assessed = assess_block(block_model(perturbed, bins), block_model(features, bins), bins, targets)
    one = reduce({"": assessed}, targets.shape[1])
    return float(one.timestep_error[""]), float(one.pattern_error[""]), float(1 - one.coherence[""])


def add_noise(
    block_model: BlockModel, features: Float[Tensor, "m n"], noise_level: float, generator: torch.Generator
) -> Float[Tensor, "m n"]:
    """Features with noise of `size` deviations of each channel."""
    return features + noise_level * block_model.deviation * torch.randn(features.shape, generator=generator)


def shuffle_within(groups: Int[Tensor, " m"], generator: torch.Generator) -> Int[Tensor, " m"]:
    """A permutation of the rows that moves each one to the place of another of its group, where there is another."""
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
"""Temperatures tried, as multiples of the fitted one: from a third to three times."""
REFERENCE_NOISE = 0.5


@torch.no_grad()
def tune(block_model: BlockModel, states: BlockStates, space: PatternSpace, seed: int) -> None:
    """Scale both temperatures to the best likelihood on `states`; note reliability and reference responses."""
    labels = space.label(block_model.standardise(states.features), states.s)
    count, patterns = len(block_model.reliability), len(block_model.patterns.vertices)
    said = block_model(states.features, states.bins)
    block_model.bins.temperature.mul_(best_factor(said.log_bins, soft_targets(states.bins, count)))
    block_model.patterns.temperature.mul_(best_factor(said.log_patterns, F.one_hot(labels, patterns).float()))

    block_model.reliability.copy_(reliability(said.log_bins.argmax(dim=1), states.bins, count))
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
    """Share of answers within one bin of the truth, for each bin; the share of all bins counts as one more state."""
    near = ((predicted_bins - bins).abs() <= 1).float()
    hits, seen = torch.bincount(bins, near, minlength=count), torch.bincount(bins, minlength=count)
    return ((hits + near.mean()) / (seen + 1)).float()
