"""How often each time bin is sampled: the proposal q that follows from the profile of the student's errors.

pi is the measure of the loss, q only how it is sampled: a state in bin k has the importance weight pi_k / q_k, not
normalised inside a batch, so the mean of the loss does not move (mathematics.md section 4). A cache holds states at
given times, so sampling a time is sampling a bin, then one of its stored states uniformly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from configs.values import PictureSize, Strict
from shards.stream.order import Order, Pairs
from shards.stream.schedule import SizedOrder, SizeSchedule, grouped_by_size
from stages.david.difficulty_profile import DifficultyProfile, PerBin
from stages.flow.timesteps import bin_of_step, shift_time
from stages.system.refusal import Refused

MIN_EFFECTIVE_SHARE = 0.5
"""David's share of q sinks until a sample is worth at least half of one under pi."""

BatchT = TypeVar("BatchT")


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


@dataclass(frozen=True)
class SizeStream:
    """The states of one picture size, and the seed of their order."""

    size: PictureSize | None
    seed: int
    pairs: Pairs
    k: Int[np.ndarray, " n"]
    """the teacher's step of each pair"""


class TimestepSampler:
    """The order of a cache's states under q, which stays for a span of samples; the next q follows from the profile.

    Sample n -> (record, state) is a function of the seed, n and q, so a run resumes from profile and q. Which picture
    size a sample has follows from the schedule, never from q.
    """

    def __init__(
        self,
        config: SamplingConfig,
        profile: DifficultyProfile,
        streams: Sequence[SizeStream],
        schedule: SizeSchedule,
        steps: int,
    ) -> None:
        """`streams` has the states of each size of `schedule`, whose shares are their numbers; `steps` the teacher's.

        A span ends at the first batch at or after a multiple of its length, which is a whole number of largest batches.
        """
        self.config, self.profile, self.streams, self.schedule, self.steps = config, profile, streams, schedule, steps
        bins = [bin_of_step(torch.from_numpy(np.asarray(one.k)), profile.bins, steps) for one in streams]
        self._bin_of_pair = [of_size.numpy() for of_size in bins]
        self._stored = torch.stack([torch.bincount(of_size, minlength=profile.bins) for of_size in bins]).double()
        stored = self._stored.sum(dim=0)
        self._has_states = stored > 0
        self.pi = self._restrict_to_stored(shift_distribution(stored / stored.sum(), config.timestep_shift))
        self.q = self.pi
        largest = max(schedule.rows)
        self.span_samples = -(-config.profile_samples // largest) * largest

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

    def importance_weight(self, k: Int[Tensor, " b"], size: PictureSize | None = None) -> Float[Tensor, " b"]:
        """pi / q of states at these steps of the teacher, of one size; 1 in the original's scheme, which is biased.

        Of several sizes a state of bin g and size z comes with probability p_z q_g N_gz / (N_g W_z) instead of
        q_g N_gz / N_g, so its weight has the factor W_z / p_z (`grouped_by_size`).
        """
        if self.config.scheme == "original":
            return torch.ones_like(k, dtype=torch.float32)
        weights = torch.where(self._has_states, self.pi / self.q, 0.0)
        if len(self.streams) > 1:
            weights = weights * self._size_weights()[[one.size for one in self.streams].index(size)]
        return weights.float().to(k.device)[bin_of_step(k, self.profile.bins, self.steps)]

    def effective_share(self) -> float:
        """Effective samples per sample; for the journal."""
        if self.config.scheme == "original":
            return 1.0
        if len(self.streams) == 1:
            return effective_share(self.pi, self.q)
        of_bin = (self._share_in_bin() * self._size_weights()[:, None]).sum(dim=0)
        return float(1 / (self.pi.square() / self.q * of_bin)[self.pi > 0].sum())

    def order(self) -> Order:
        """The order of the states as long as q stays; raises `Refused` when it leaves a size without any."""
        seeds, pairs = [one.seed for one in self.streams], [one.pairs for one in self.streams]
        orders, _ = grouped_by_size(seeds, pairs, self._bin_of_pair, self.q.numpy())
        if None in orders:
            size = self.streams[orders.index(None)].size
            raise Refused(
                f"sampling.scheme = {self.config.scheme}: no bin with states of {size} is reliable, so none is left - "
                "fit David with more steps"
            )
        return SizedOrder(orders, self.schedule)

    def batches(self, start_sample: int, stream: Callable[[int, Order], Iterator[BatchT]]) -> Iterator[BatchT]:
        """The batches of `stream` from this sample on; q is updated at each whole span, never inside one.

        The update waits until the batch before it was learnt from, so nothing is read ahead under an old q.
        """
        number = self.schedule.block_of(start_sample)
        if inside := start_sample - self.schedule.first_sample(number):
            raise ValueError(f"sample {start_sample} is {inside} rows into a batch")
        begins_span = not number or self._ends_span(self.schedule.first_sample(number - 1), start_sample)
        while True:
            if begins_span:
                self.update_q()
            for block, batch in zip(
                self.schedule.blocks(start_sample), stream(start_sample, self.order()), strict=False
            ):
                yield batch
                start_sample = block.first + block.rows
                if begins_span := self._ends_span(block.first, start_sample):
                    break
            else:
                return

    def _ends_span(self, first_sample: int, end_sample: int) -> bool:
        """Whether a batch of these samples is the last of its span."""
        return end_sample // self.span_samples > first_sample // self.span_samples

    def _share_in_bin(self) -> Float[Tensor, "sizes T"]:
        """N_gz / N_g: which share of the states of bin g has size z."""
        return self._stored / self._stored.sum(dim=0).clamp_min(1)

    def _size_weights(self) -> Float[Tensor, " sizes"]:
        """W_z / p_z: a size comes by its share p_z of the states, where q alone would let it come by W_z."""
        shares = (self._share_in_bin() * self.q).sum(dim=1)
        return shares / shares.sum() / (self._stored.sum(dim=1) / self._stored.sum())

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
