"""Which stored draws training asks for, and what they then weigh.

A cache holds states at given times, so choosing a time is choosing a bin, and then one of its stored draws, all alike.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.refusal import Refused
from shards.order import GroupedOrder, Order, Pairs
from stages.david.profile import PerBin, Profile
from stages.david.sampling import SamplingConfig, effective_share, mixed, shifted, wanted
from stages.flow.timesteps import bin_of_step

Made = TypeVar("Made")


class TimeChoice:
    """The bins of a cache's draws, and q, which stays for a span of samples; the next one follows from the profile.

    Sample n -> (record, draw) is a function of the seed, n and q, so a run goes on from profile and q.
    """

    def __init__(
        self,
        config: SamplingConfig,
        profile: Profile,
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
        self._stored = stored > 0
        self.pi = self._kept(shifted(stored / stored.sum(), config.timestep_shift))
        self.q = self.pi
        self.span = -(-config.profile_samples // batch_size) * batch_size

    def propose(self) -> None:
        """Take the q that follows from the profile; the first span is drawn by pi, and fills it."""
        config, profile = self.config, self.profile
        if profile.is_empty:
            return
        if config.scheme == "david":
            difficulty = profile.difficulty(config.reliability_threshold).cpu()
            self.q = mixed(self.pi, wanted(self.pi, difficulty), config.david_share)
        elif config.scheme == "original":
            # Reconstructed (david.md 4.4): the published parts name the knobs, not the formula.
            trusted = profile.trusted(config.reliability_threshold)
            share = torch.where(trusted, profile.raw_difficulty(), 0.0).cpu()
            if not share.sum() > 0:
                raise Refused("sampling.scheme = original: David trusts no bin, so none is left - fit him better")
            self.q = self._kept(shifted(share / share.sum(), config.timestep_shift))

    def omega(self, k: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The weight of draws at these steps of the teacher; 1 in the original's scheme, whose mean is another one."""
        if self.config.scheme == "original":
            return torch.ones_like(k, dtype=torch.float32)
        weights = torch.where(self._stored, self.pi / self.q, 0.0)
        return weights.float().to(k.device)[bin_of_step(k, self.profile.bins, self.steps)]

    def effective_share(self) -> float:
        """What a sample is worth in samples drawn by pi; for the journal."""
        return 1.0 if self.config.scheme == "original" else effective_share(self.pi, self.q)

    def order(self) -> Order:
        """The order of the stream as long as q stays."""
        return GroupedOrder(self.seed, self.pairs, self._bin_of_pair.numpy(), self.q.numpy())

    def batches(self, start_sample: int, stream: Callable[[int, Order], Iterator[Made]]) -> Iterator[Made]:
        """The batches of `stream` from this sample on; q is proposed anew at each whole span, never inside one.

        A new q waits until the batch before it was learnt from, so what is read ahead never outlives its q.
        """
        while True:
            into = start_sample % self.span
            if into % self.batch_size:
                raise ValueError(f"sample {start_sample} is {into % self.batch_size} rows into a batch")
            if not into:
                self.propose()
            left = range((self.span - into) // self.batch_size)
            for _, batch in zip(left, stream(start_sample, self.order()), strict=False):
                yield batch
            start_sample += self.span - into

    def state_dict(self) -> dict[str, Any]:
        """All that a step or a new span changes."""
        return {"q": self.q.clone(), "profile": self.profile.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        self.profile.load_state_dict(state["profile"])
        self.q = state["q"].cpu().clone()

    def _kept(self, share: PerBin) -> PerBin:
        """Without the bins of which nothing is stored."""
        kept = torch.where(self._stored, share, 0.0)
        return kept / kept.sum()
