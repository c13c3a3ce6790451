"""David on trial: how well he reads the teacher's own features, and how he answers when they are spoilt."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from configs.strict import Stored
from stages.david.assessment import assess_block, reduce, soft_targets
from stages.david.companion import Companion
from stages.david.patterns import PatternSpace
from stages.david.states import States

NOISES = (0.3, 0.5, 1.0)
CONFIDENCES = 15
NEAR = 2

Response = tuple[float, float, float]
"""Timestep error, pattern error, 1 - coherence."""

HEADING = (
    "block      exact within2 chance | calibration error: soft within2 | pattern acc use | "
    "response (e_t e_p 1-coh) at .3 .5 1 sd | content shuffled | time shuffled | all shuffled | s"
)


class Trial(Stored):
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
    noise: tuple[Response, ...]
    """responses to noise of .3, .5 and 1 deviation of each channel"""
    content_shuffled: Response
    """each state with the features of another one in its bin"""
    time_shuffled: Response
    """each state with the features of another one of its prompt"""
    shuffled: Response
    """each state with the features of any other"""

    def line(self, block: str, seconds: float) -> str:
        """The same for a person."""
        marks = f"{self.exact:5.3f} {self.within_two:7.3f} {self.chance:6.3f}"
        calibration = f"{self.soft_calibration:5.3f} {self.calibration:5.3f}"
        patterns = f"{self.pattern_accuracy:5.3f} {self.pattern_use:5.3f}"
        spoilt = [*self.noise, self.content_shuffled, self.time_shuffled, self.shuffled]
        told = " | ".join(" ".join(f"{value:.3f}" for value in response) for response in spoilt)
        return f"{block:10} {marks} | {calibration} | {patterns} | {told} | {seconds:.1f}"


@torch.no_grad()
def try_out(companion: Companion, states: States, space: PatternSpace, seed: int) -> Trial:
    """Every mark of a companion on `states`."""
    x, bins, generator = states.features, states.bins, torch.Generator().manual_seed(seed)
    said, targets = companion(x, bins), soft_targets(bins, len(companion.reliability))
    labels = space.label(companion.standardise(x), states.s)
    answer = said.log_bins.argmax(dim=1)
    near = (answer - bins).abs() <= NEAR
    confidence = said.log_bins.exp().amax(dim=1)

    def answered(rows: Int[Tensor, " m"]) -> Response:
        return respond(companion, x[rows], x, bins)

    return Trial(
        exact=float((answer == bins).float().mean()),
        within_two=float(near.float().mean()),
        chance=float(mass_near(torch.bincount(bins, minlength=targets.shape[1]).float()).max() / len(bins)),
        soft_calibration=calibration_error(confidence, targets.gather(1, answer[:, None]).squeeze(1)),
        calibration=calibration_error(
            mass_near(said.log_bins.exp()).gather(1, answer[:, None]).squeeze(1), near.float()
        ),
        pattern_accuracy=float((said.log_patterns.argmax(dim=1) == labels).float().mean()),
        pattern_use=use(labels, said.log_patterns.shape[1]),
        noise=tuple(respond(companion, noised(companion, x, size, generator), x, bins) for size in NOISES),
        content_shuffled=answered(shuffled_within(bins, generator)),
        time_shuffled=answered(shuffled_within(states.key, generator)),
        shuffled=answered(torch.randperm(len(x), generator=generator)),
    )


def respond(
    companion: Companion, spoilt: Float[Tensor, "m n"], features: Float[Tensor, "m n"], bins: Int[Tensor, " m"]
) -> Response:
    """The three numbers, as errors, for spoilt features in place of the teacher's."""
    targets = soft_targets(bins, len(companion.reliability))
    assessed = assess_block(companion(spoilt, bins), companion(features, bins), bins, targets)
    one = reduce({"": assessed}, targets.shape[1])
    return float(one.timestep_error[""]), float(one.pattern_error[""]), float(1 - one.coherence[""])


def noised(
    companion: Companion, features: Float[Tensor, "m n"], size: float, generator: torch.Generator
) -> Float[Tensor, "m n"]:
    """Features with noise of `size` deviations of each channel."""
    return features + size * companion.deviation * torch.randn(features.shape, generator=generator)


def shuffled_within(groups: Int[Tensor, " m"], generator: torch.Generator) -> Int[Tensor, " m"]:
    """A permutation of the rows that moves each one to the place of another of its group, where there is another."""
    mixed = torch.randperm(len(groups), generator=generator)
    mixed = mixed[groups[mixed].argsort(stable=True)]
    _, sizes = groups.unique(return_counts=True)
    turned = torch.cat([part.roll(1) for part in mixed.split(sizes.tolist())])
    permutation = torch.empty_like(mixed)
    permutation[mixed] = turned
    return permutation


def mass_near(masses: Float[Tensor, "... T"]) -> Float[Tensor, "... T"]:
    """For each bin the sum over the bins at most two away."""
    return F.pad(masses, (NEAR, NEAR)).unfold(-1, 2 * NEAR + 1, 1).sum(-1)


def calibration_error(confidence: Float[Tensor, " m"], truth: Float[Tensor, " m"]) -> float:
    """Expected calibration error: |mean confidence - mean truth| in 15 equal classes of confidence, weighted."""
    classes = (confidence * CONFIDENCES).long().clamp(0, CONFIDENCES - 1)
    gaps = torch.bincount(classes, (confidence - truth).double(), minlength=CONFIDENCES)
    return float(gaps.abs().sum() / len(confidence))


def use(labels: Int[Tensor, " m"], count: int) -> float:
    """Entropy of the labels' shares over its maximum."""
    shares = torch.bincount(labels, minlength=count) / len(labels)
    return float(torch.special.entr(shares).sum() / math.log(count))
