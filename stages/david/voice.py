"""David's voice in the loss: what he said lately, and the lambdas that follow."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from configs.refusal import Refused, did_you_mean
from stages.david.assessment import Assessment, BlockAssessment
from stages.david.fusion import FusionConfig, Heard, Known, PerBlock, W, lambdas

REFERENCE_FLOOR = 1e-3
"""A reference response below this says that David does not see there; numbers of its size are rounding."""
READINGS = 5


def refuse_unknown(config: FusionConfig, blocks: tuple[str, ...]) -> None:
    """Raise `Refused` for the weight of a block that is not there."""
    for name in config.block_weights:
        if name not in blocks and name not in W:
            raise Refused(f"fusion.block_weights.{name}: no such block - {did_you_mean(name, blocks)}")


class Voice:
    """Running means of what David says of each block, with a memory counted in samples, and lambda from them.

    A block of which nothing was heard yet counts as faultless.
    """

    def __init__(
        self,
        config: FusionConfig,
        blocks: tuple[str, ...],
        bins: int,
        reference: Assessment | None = None,
        alphas: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`reference` is the response to noise of half a deviation on the teacher's own features, as the fit found it.

        Raises `Refused` when the formula needs a reference and there is none, or for a weight of an unknown block.
        """
        refuse_unknown(config, blocks)
        self.config, self.blocks, self.device = config, blocks, torch.device(device)
        self._most_nats = math.log(bins)
        alphas = dict.fromkeys(blocks, config.seed_coherence) if alphas is None else alphas
        self.known = Known(
            config,
            self._vector([config.block_weights.get(block, 1.0) for block in blocks]),
            self._vector([alphas[block] for block in blocks]),
            _another(len(blocks), config.placebo_seed).to(device),
            None if reference is None else self._references(reference),
        )
        self.quiet: PerBlock = lambdas(Heard.faultless(self.known.w), self.known)
        """the lambdas of a faultless student: w_b, unless the formula is uniform or the seed's"""
        self._samples = 0
        self._sums = torch.zeros(len(blocks), READINGS, device=device)
        self._heard = torch.zeros(len(blocks), device=device)

    @property
    def is_warm(self) -> bool:
        """Whether the warm-up is over."""
        return self._samples >= self.config.warmup_samples

    def lambdas(self) -> PerBlock:
        """Lambda from all that was learnt so far, at first drawn towards that of a faultless student."""
        warmup = self.config.warmup_samples
        share = min(1.0, self._samples / warmup) if warmup else 1.0
        return torch.lerp(self.quiet, lambdas(self.heard(), self.known), share)

    def hear(
        self,
        assessed: Mapping[str, BlockAssessment],
        omega: Float[Tensor, " b"] | None = None,
        reliable: Mapping[str, Bool[Tensor, " b"]] | None = None,
    ) -> Float[Tensor, "n_blocks READINGS+1"]:
        """Sums of what David says of some samples, and of their votes; sums of all parts of a batch are learnt from.

        `omega` weighs samples whose times were chosen; a sample that he cannot judge in a block has no vote there.
        """
        readings = torch.stack([_readings(assessed[block]) for block in self.blocks]).to(self._sums)
        votes = torch.ones(len(self.blocks), readings.shape[2], device=self.device)
        if reliable is not None:
            votes = votes * torch.stack([reliable[block] for block in self.blocks])
        if omega is not None:
            votes = votes * omega
        return torch.cat([(readings * votes[:, None]).sum(dim=2), votes.sum(dim=1, keepdim=True)], dim=1)

    def learn(self, sums: Float[Tensor, "n_blocks READINGS+1"], samples: int) -> None:
        """Take in what was heard of so many samples."""
        half_life = self.config.half_life_samples
        kept = 2.0 ** (-samples / half_life) if half_life else 0.0
        self._sums = kept * self._sums + sums[:, :READINGS]
        self._heard = kept * self._heard + sums[:, READINGS]
        self._samples += samples

    def heard(self) -> Heard:
        """What David says at present; averaged before negative excess is cut off, because noise has a positive part."""
        means = torch.where(self._heard > 0, self._sums.T / self._heard, 0.0)
        excess, divergence, lost, cross_entropy, entropy = means
        return Heard((excess / self._most_nats).clamp(0, 1), divergence, 1 - lost, cross_entropy, entropy)

    def assessment(self) -> Assessment:
        """The three numbers at present, by the names of the blocks."""
        said = self.heard()
        each = (said.timestep_error, said.pattern_error, said.coherence)
        return Assessment(*(dict(zip(self.blocks, numbers, strict=True)) for numbers in each))

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes."""
        return {"samples": self._samples, "sums": self._sums.clone(), "heard": self._heard.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` once gave."""
        if state["sums"].shape != self._sums.shape:
            raise Refused(f"David's state speaks of {len(state['sums'])} blocks, this student has {len(self.blocks)}")
        self._samples = int(state["samples"])
        self._sums, self._heard = state["sums"].to(self._sums, copy=True), state["heard"].to(self._heard, copy=True)

    def _vector(self, values: list[float]) -> PerBlock:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _references(self, found: Assessment) -> tuple[PerBlock, ...]:
        responses = (
            [float(found.timestep_error[block]) for block in self.blocks],
            [float(found.pattern_error[block]) for block in self.blocks],
            [1 - float(found.coherence[block]) for block in self.blocks],
        )
        return tuple(self._vector(response).clamp_min(REFERENCE_FLOOR) for response in responses)


def _readings(said: BlockAssessment) -> Float[Tensor, "READINGS b"]:
    """Lost coherence instead of coherence: a sum of zeros is exact."""
    return torch.stack([said.excess, said.divergence, 1 - said.coherence, said.cross_entropy, said.entropy])


def _another(n: int, seed: int) -> Tensor:
    """For each of n things another one: a single random cycle, so that nothing stays where it is."""
    cycle = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return other
