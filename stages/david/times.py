"""How often each time bin is sampled: a profile of the student's errors per bin, and the proposal q that follows.

pi is the measure of the loss, q only how it is sampled: a state in bin k has the importance weight pi_k / q_k, not
normalised inside a batch, so the mean of the loss does not move (mathematics.md section 4). A cache holds states at
given times, so sampling a time is sampling a bin, then one of its stored states uniformly.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from configs.values import Strict
from shards.order import GroupedOrder, Order, Pairs
from stages.david.assessment import BlockAssessment
from stages.david.fusion import FusionConfig
from stages.flow.timesteps import bin_of_step, shift_time
from stages.system.refusal import Refused

BIN_QUANTITIES = ("excess", "divergence", "cross_entropy", "entropy", "teacher_accuracy")
MIN_EFFECTIVE_SHARE = 0.5
"""David's share of q sinks until a sample is worth at least half of one under pi."""

PerBin = Float[Tensor, " T"]
BatchT = TypeVar("BatchT")


class DifficultyProfile:
    """Exponential means over the blocks and over the samples of each bin, with a half-life in samples."""

    def __init__(
        self, fusion: FusionConfig, bins: int, half_life_samples: int, device: torch.device | str = "cpu"
    ) -> None:
        """`fusion` has the weights of the two errors in the difficulty."""
        self.fusion, self.bins, self.half_life_samples = fusion, bins, half_life_samples
        self._sums = torch.zeros(len(BIN_QUANTITIES), bins, dtype=torch.float64, device=device)
        self._count = torch.zeros(bins, dtype=torch.float64, device=device)

    def observe(
        self, bins: Int[Tensor, " b"], assessed: Mapping[str, BlockAssessment]
    ) -> Float[Tensor, "quantities+1 T"]:
        """Sums over some samples, and their number in each bin; these add up over the parts of a batch.

        States of a bin are sampled alike, so they have no weights here.
        """
        means = [torch.stack([getattr(a, name) for a in assessed.values()]).mean(dim=0) for name in BIN_QUANTITIES]
        # A product with a table of zeros and ones adds up in the same order every time; scattering need not.
        member = F.one_hot(bins, self.bins).to(self._sums)
        return torch.cat([torch.stack(means).to(self._sums) @ member, member.sum(dim=0, keepdim=True)])

    def update(self, sums: Float[Tensor, "quantities+1 T"], samples: int) -> None:
        """Take in what was observed of so many samples."""
        kept = 2.0 ** (-samples / self.half_life_samples)
        self._sums = kept * self._sums + sums[:-1]
        self._count = kept * self._count + sums[-1]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was observed yet."""
        return not bool(self._count.any())

    def reliable_bins(self, threshold: float) -> Bool[Tensor, " T"]:
        """The observed bins in which David classifies at least this share of the teacher's own features rightly."""
        return (self._count > 0) & (self._means()[4] >= threshold)

    def difficulty(self, threshold: float) -> PerBin:
        """alpha e_t + beta e_p of each bin, shrunk towards the mean of all; an unreliable bin gets that mean.

        A bin's own mean has the weight 1/2 after `half_life_samples` / `bins` observations. Zero everywhere as long as
        no bin is reliable.
        """
        reliable = self.reliable_bins(threshold)
        if not reliable.any():
            return torch.zeros_like(self._count)
        errors, prior = self._sums[:2], self.half_life_samples / self.bins
        overall = errors[:, reliable].sum(dim=1, keepdim=True) / self._count[reliable].sum()
        excess, divergence = (errors + prior * overall) / (self._count + prior)
        difficulty = self._combine_errors(excess, divergence)
        return torch.where(reliable, difficulty, difficulty[reliable].mean())

    def raw_difficulty(self) -> PerBin:
        """The same mixture of the original's quantities, cross-entropy and entropy, without shrinkage."""
        _, _, cross_entropy, entropy, _ = self._means()
        return self._combine_errors(cross_entropy, entropy)

    def _means(self) -> Float[Tensor, "quantities T"]:
        return torch.where(self._count > 0, self._sums / self._count, 0.0)

    def _combine_errors(self, nats: PerBin, share: PerBin) -> PerBin:
        return self.fusion.alpha * (nats / math.log(self.bins)).clamp(0, 1) + self.fusion.beta * share

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"sums": self._sums.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        if state["sums"].shape != self._sums.shape:
            raise Refused(f"David's profile has {state['sums'].shape[-1]} bins of time, this David has {self.bins}")
        self._sums, self._count = state["sums"].to(self._sums, copy=True), state["count"].to(self._count, copy=True)


class SamplingConfig(Strict):
    """How the times of training are sampled; options of the original keep their names."""

    scheme: Literal["stored", "david", "original"] = Field(
        "stored",
        description="stored: every state once an epoch; david: more of the bins with large errors, weighted by pi / q "
        "so that the loss stays the same; original: the same without weights, unreliable bins switched off, shift "
        "afterwards (biased, for the ablation)",
    )
    david_share: float = Field(
        0.7, ge=0, lt=1, description="David's share of q, the rest is pi: pi / q <= 1 / (1 - david_share)"
    )
    profile_samples: int = Field(
        2500, ge=1, description="half-life of David's profile of the bins, and how long a q stays, in samples"
    )
    reliability_threshold: float = Field(
        0.15,
        ge=0,
        le=1,
        description="a bin is neutral where David classifies less than this share of the teacher's features rightly",
    )
    timestep_shift: float = Field(
        1.0, gt=0, description="shift S of pi from the times as stored; above 1 leans to noise (the original had 3)"
    )
    base_jitter: float = Field(
        5.0,
        gt=0,
        description="of the original; no effect, since a cache has fixed times (jitter of t, teacher's steps)",
    )
    adaptive_chaos: bool = Field(
        True, description="of the original; no effect, since a cache has fixed times (jitter grows with the entropy)"
    )

    @model_validator(mode="after")
    def _check_shift(self) -> "SamplingConfig":
        if self.scheme == "stored" and self.timestep_shift != 1:
            raise ValueError(f"timestep_shift = {self.timestep_shift} needs scheme david (david_share 0: shift alone)")
        return self


def shift_distribution(share: PerBin, factor: float) -> PerBin:
    """Shares of equal bins of a time after its shift, for times that are uniform inside their bin."""
    edges = torch.linspace(0, 1, len(share) + 1, dtype=torch.float64)
    sources = shift_time(edges, 1 / factor)
    low = torch.maximum(sources[:-1, None], edges[:-1])
    high = torch.minimum(sources[1:, None], edges[1:])
    return (high - low).clamp_min(0) * len(share) @ share


def difficulty_distribution(pi: PerBin, difficulty: PerBin) -> PerBin:
    """q_david: proportional to difficulty times pi; pi itself where nothing is difficult."""
    product = difficulty * pi
    return product / product.sum() if product.sum() > 0 else pi


def mix_distributions(pi: PerBin, q_david: PerBin, david_share: float) -> PerBin:
    """q = share q_david + (1 - share) pi, with the largest share up to `david_share` that is effective enough."""
    q = david_share * q_david + (1 - david_share) * pi
    while effective_share(pi, q) < MIN_EFFECTIVE_SHARE:
        david_share *= 0.95
        q = david_share * q_david + (1 - david_share) * pi
    return q


def effective_share(pi: PerBin, q: PerBin) -> float:
    """Effective sample size per sample, (E_q w)^2 / E_q w^2 = 1 / sum_k pi_k^2 / q_k; 1 at q = pi."""
    stored = pi > 0
    return float(1 / (pi[stored].square() / q[stored]).sum())


class TimestepSampler:
    """The order of a cache's states under q, which stays for a span of samples; the next q follows from the profile.

    Sample n -> (record, state) is a function of the seed, n and q, so a run resumes from profile and q.
    """

    def __init__(
        self,
        config: SamplingConfig,
        profile: DifficultyProfile,
        seed: int,
        pairs: Pairs,
        k: Int[np.ndarray, " n"],
        steps: int,
        batch_size: int,
    ) -> None:
        """`k` is the teacher's step of each pair, of `steps` in all; `batch_size` counts the rows of all ranks."""
        self.config, self.profile, self.seed, self.pairs, self.batch_size = config, profile, seed, pairs, batch_size
        self.steps = steps
        self._bin_of_pair = bin_of_step(torch.from_numpy(np.asarray(k)), profile.bins, steps)
        stored = torch.bincount(self._bin_of_pair, minlength=profile.bins).double()
        self._has_states = stored > 0
        self.pi = self._restrict_to_stored(shift_distribution(stored / stored.sum(), config.timestep_shift))
        self.q = self.pi
        self.span_samples = -(-config.profile_samples // batch_size) * batch_size

    def update_q(self) -> None:
        """Take the q that follows from the profile; the first span is sampled from pi, and fills it."""
        config, profile = self.config, self.profile
        if profile.is_empty:
            return
        if config.scheme == "david":
            difficulty = profile.difficulty(config.reliability_threshold).cpu()
            self.q = mix_distributions(self.pi, difficulty_distribution(self.pi, difficulty), config.david_share)
        elif config.scheme == "original":
            # Reconstructed (david.md 4.4): the published parts name the options, not the formula.
            reliable = profile.reliable_bins(config.reliability_threshold)
            share = torch.where(reliable, profile.raw_difficulty(), 0.0).cpu()
            if not share.sum() > 0:
                raise Refused(
                    "sampling.scheme = original: no bin is reliable, so none is left - fit David with more steps"
                )
            self.q = self._restrict_to_stored(shift_distribution(share / share.sum(), config.timestep_shift))

    def importance_weight(self, k: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """pi / q of states at these steps of the teacher; 1 in the original's scheme, which is biased."""
        if self.config.scheme == "original":
            return torch.ones_like(k, dtype=torch.float32)
        weights = torch.where(self._has_states, self.pi / self.q, 0.0)
        return weights.float().to(k.device)[bin_of_step(k, self.profile.bins, self.steps)]

    def effective_share(self) -> float:
        """Effective samples per sample; for the journal."""
        return 1.0 if self.config.scheme == "original" else effective_share(self.pi, self.q)

    def order(self) -> Order:
        """The order of the states as long as q stays."""
        return GroupedOrder(self.seed, self.pairs, self._bin_of_pair.numpy(), self.q.numpy())

    def batches(self, start_sample: int, stream: Callable[[int, Order], Iterator[BatchT]]) -> Iterator[BatchT]:
        """The batches of `stream` from this sample on; q is updated at each whole span, never inside one.

        The update waits until the batch before it was learnt from, so nothing is read ahead under an old q.
        """
        while True:
            offset = start_sample % self.span_samples
            if offset % self.batch_size:
                raise ValueError(f"sample {start_sample} is {offset % self.batch_size} rows into a batch")
            if not offset:
                self.update_q()
            left = range((self.span_samples - offset) // self.batch_size)
            for _, batch in zip(left, stream(start_sample, self.order()), strict=False):
                yield batch
            start_sample += self.span_samples - offset

    def state_dict(self) -> dict[str, Any]:
        """All that a step or a new span changes."""
        return {"q": self.q.clone(), "profile": self.profile.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.profile.load_state_dict(state["profile"])
        self.q = state["q"].cpu().clone()

    def _restrict_to_stored(self, share: PerBin) -> PerBin:
        """Renormalised without the bins of which nothing is stored."""
        kept = torch.where(self._has_states, share, 0.0)
        return kept / kept.sum()
