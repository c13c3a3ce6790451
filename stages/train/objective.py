"""The training loss: both velocities, their guidance and the block term, with the weight of the block term."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from configs.values import Range, Strict
from shards.batch import Batch
from shards.stats import Statistics
from shards.table import Table
from stages.flow.path import per_sample
from stages.flow.solver import remove_guidance
from stages.flow.timesteps import min_snr_weight, v_prediction_weight
from stages.nets.student import Prediction
from stages.system.refusal import Refused, did_you_mean
from stages.train.losses import (
    FeatureScale,
    Losses,
    block_errors,
    cosine_errors,
    data_velocity,
    floor_deviations,
    guidance_error,
    teacher_norm_errors,
    velocity_error,
)

BLOCK_FORMULAS = {"cosine": cosine_errors, "teacher_norm": teacher_norm_errors}
"""Of the forms of the block term that need no deviations."""


class ObjectiveConfig(Strict):
    """The terms of the loss and their weights (mathematics.md sections 4 to 6)."""

    uncond_weight: float = Field(
        1.0,
        ge=0,
        description="weight u of the unconditional branch: flow error = (conditional + u unconditional) / (1 + u)",
    )
    guidance_weight: float = Field(1.0, ge=0, description="weight of the guidance-consistent term; 0 leaves it out")
    guidance_range: Range = Field(
        (1.0, 8.0), description="lowest and highest guidance scale w of that term, drawn uniformly per sample"
    )
    block_weight: float = Field(0.05, ge=0, description="weight of the block term at the start of training")
    block_form: Literal["standardised", "cosine", "teacher_norm"] = Field(
        "standardised",
        description="pooled features compared as standardised differences, by their plain cosine, or (teacher_norm) by "
        "their squared difference over the teacher's squared norm, as in LAPTOP-Diff",
    )
    velocity_target: Literal["teacher", "data"] = Field(
        "teacher",
        description="of the conditional branch, also in the guidance term: the teacher's prediction, or (data) "
        "(x_s - x0) / s towards the cached picture; the unconditional branch keeps the teacher's",
    )
    block_bins: int = Field(10, ge=1, description="bins of s with deviations of their own, for the standardised form")
    block_weights: Mapping[str, Annotated[float, Field(ge=0)]] = Field(
        {"up_3": 0.0},
        description="weight w_b of single blocks in the block term, from which David's lambda starts; 0 leaves a block "
        "out. A block not named has the published weight (0.7 0.9 1 1.1 1.2 1.1 1 0.9 0.7) in distill, 1 elsewhere",
    )
    blocks_until: float | None = Field(
        0.6, gt=0, description="share of training at which the block term has fallen to 0, linearly; none keeps it"
    )
    block_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the block term's share of the gradient norm, before it falls: its weight follows from measured "
        "gradients; none takes block_weight as it is",
    )
    loss_weighting: Literal["uniform", "min_snr", "vp"] = Field(
        "uniform",
        description="weight w(s) of the velocity errors: 1; min((1 - s)^2, gamma s^2); or vp, s^2 + (1 - s)^2: errors "
        "of v-prediction on the teacher's path",
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="gamma of the min_snr weighting, a signal-to-noise ratio")

    @property
    def needs_x0(self) -> bool:
        """Whether batches need the pictures of their records."""
        return self.velocity_target == "data"

    def identity(self) -> dict[str, Any]:
        """What a run's identity holds of it; without a setting at its default that earlier runs did not have."""
        return self.model_dump(mode="json", exclude=None if self.needs_x0 else {"velocity_target"})

    def annealed_block_weight(self, progress: float) -> float:
        """Weight of the block term after the share `progress` of training."""
        return self.block_weight * (1 if self.blocks_until is None else max(0.0, 1 - progress / self.blocks_until))

    def weights_of(self, blocks: Sequence[str], standard: Mapping[str, float]) -> dict[str, float]:
        """w_b of these blocks: as configured, else `standard`, else 1."""
        return {block: self.block_weights.get(block, standard.get(block, 1.0)) for block in blocks}

    def time_weight(self, s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """w(s) of the velocity errors."""
        if self.loss_weighting == "min_snr":
            return min_snr_weight(s, self.min_snr_gamma)
        return v_prediction_weight(s) if self.loss_weighting == "vp" else torch.ones_like(s)


class Objective:
    """The loss of one batch.

    `blocks` names the blocks in the order of the batch's features; the standardised form needs `scale`;
    `standard_weights` is w_b of the blocks that the configuration does not name (1 where neither does).
    Raises `Refused` when the configuration weights a block that the cache does not have.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        blocks: tuple[str, ...],
        scale: FeatureScale | None = None,
        standard_weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.config, self.blocks, self.scale, self.standard_weights = config, blocks, scale, standard_weights
        # A pruned student lacks blocks of the cache, whose weights then mean nothing.
        known = [*blocks, *(scale.deviations if scale else ())]
        for name in config.block_weights:
            if blocks and name not in known:
                raise Refused(
                    f"objective.block_weights.{name}: the cache has no such block - {did_you_mean(name, known)}"
                )
        if blocks and config.block_form == "standardised" and scale is None:
            raise ValueError("the standardised block form needs the deviations of the features")

    def to(self, device: torch.device) -> "Objective":
        """The same objective on another device."""
        return Objective(self.config, self.blocks, self.scale.to(device) if self.scale else None, self.standard_weights)

    def static_lambdas(self, device: torch.device) -> Float[Tensor, " n_blocks"]:
        """w_b of every block: its lambda without an assessor."""
        return torch.tensor(list(self.block_weights.values()), device=device)

    @property
    def block_weights(self) -> dict[str, float]:
        """w_b by block."""
        return self.config.weights_of(self.blocks, self.standard_weights)

    def __call__(
        self,
        output: Prediction,
        batch: Batch,
        lambdas: Float[Tensor, " n_blocks"],
        block_weight: float,
        guidance_scales: Float[Tensor, " b"],
        importance_weight: Float[Tensor, " b"] | None = None,
    ) -> Losses:
        """The loss of a batch, with the present `block_weight` and the guidance scale w of each sample.

        `importance_weight` weights whole samples and is not normalised inside the batch (mathematics.md section 4).
        Rows with their own picture as target count with the error of their conditional branch alone.
        """
        config = self.config
        importance_weight = torch.ones_like(batch.s) if importance_weight is None else importance_weight
        weights = importance_weight * config.time_weight(batch.s)

        towards = batch.v_cond if config.velocity_target == "teacher" else data_velocity(batch.x_s, batch.s, batch.x0)
        conditional = velocity_error(output.v_cond, _conditional_target(output, batch, towards))
        unconditional = velocity_error(output.v_uncond, batch.v_uncond)
        flow_errors = (conditional + config.uncond_weight * unconditional) / (1 + config.uncond_weight)
        if batch.own_guidance is not None:
            flow_errors = torch.where(batch.own_guidance > 0, conditional, flow_errors)
        flow = (weights * flow_errors).mean()

        guidance_errors = guidance_error(output.v_cond - towards, output.v_uncond - batch.v_uncond, guidance_scales)
        guidance_errors = _zero_without_teacher(guidance_errors, batch)
        guidance = (weights * guidance_errors).mean()

        with torch.set_grad_enabled(block_weight > 0 and torch.is_grad_enabled()):
            by_block = _zero_without_teacher(self._block_errors(output, batch), batch)
            blocks = (by_block * importance_weight).mean(dim=1)

        rest = flow + config.guidance_weight * guidance
        total = rest
        if block_weight > 0 and self.blocks:
            total = total + block_weight * (lambdas * blocks).sum()
        parts = (flow, guidance, blocks, flow_errors, guidance_errors, by_block, importance_weight)
        return Losses(total, rest, *(part.detach() for part in parts))

    def sample_guidance_scales(self, count: int, generator: torch.Generator) -> Float[Tensor, " b"]:
        """`count` guidance scales, uniform in `guidance_range`, drawn on the CPU."""
        lowest, highest = self.config.guidance_range
        return lowest + (highest - lowest) * torch.rand(count, generator=generator)

    def _block_errors(self, output: Prediction, batch: Batch) -> Float[Tensor, "n_blocks b"]:
        targets = {block: batch.features[block] for block in self.blocks}
        if not targets:
            return torch.zeros(0, len(batch.s), device=batch.s.device)
        if (formula := BLOCK_FORMULAS.get(self.config.block_form)) is not None:
            return formula(output.features, targets)
        assert self.scale is not None
        return block_errors(output.features, targets, self.scale.at(batch.s))


def _conditional_target(
    output: Prediction, batch: Batch, towards: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """The target of the conditional branch: `towards`, or the flow to the row's own picture.

    That picture is the target under guidance w, so v_u + w (v_c - v_u) = eps - x0 with the student's own v_u, which
    gets no gradient from it: v_c = v_u + (eps - x0 - v_u) / w. Guidance at w is then the flow from noise to such
    pictures, where the teacher's guidance only bends another flow (Chen et al. 2025, arXiv:2501.15420, train the
    guided flow by this interpolation; here it trains the conditional one, and the guidance scale stays free).
    """
    if batch.own_guidance is None:
        return towards
    own = remove_guidance(batch.v_cond, output.v_uncond.detach(), batch.own_guidance.clamp_min(1))
    return torch.where(per_sample(batch.own_guidance, own) > 0, own, towards)


def _zero_without_teacher(errors: Float[Tensor, "*n b"], batch: Batch) -> Float[Tensor, "*n b"]:
    """The errors of the rows with teacher predictions; 0 for the others."""
    own = batch.own_guidance
    return errors if own is None else torch.where(own > 0, torch.zeros_like(errors), errors)


MEASURE_EVERY_SAMPLES = 1280
"""A measurement costs two more backward passes."""
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e3


class BlockTermWeight:
    """The block term's weight: as configured, or held at a share of the gradient norm that is measured regularly.

    Its state is kept in the checkpoint.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config, self.factor, self._last_measured_samples = config, 1.0, -MEASURE_EVERY_SAMPLES

    def weight(self, progress: float) -> float:
        """Weight of the block term after the share `progress` of training."""
        return self.factor * self.config.annealed_block_weight(progress)

    def measure(
        self, losses: Losses, progress: float, samples: int, parameters: Sequence[nn.Parameter]
    ) -> Sequence[Tensor]:
        """The gradient norms of the rest of the loss and of the block term at `block_weight`; () when not due.

        They add up over micro-batches and processes; only their ratio counts.
        """
        weight, age = self.weight(progress), samples - self._last_measured_samples
        if self.config.block_share is None or weight <= 0 or age < MEASURE_EVERY_SAMPLES:
            return ()
        rest = _gradient_norm(losses.rest, parameters)
        return rest, _gradient_norm(losses.total - losses.rest, parameters) * self.config.block_weight / weight

    def update(self, gradient_norms: Sequence[Tensor], samples: int) -> None:
        """Set the factor for the next steps from norms that were measured, if any.

        factor = share / (1 - share) |g| / |g_b|, averaged geometrically with the previous factor, because the norms of
        one step are noisy.
        """
        share = self.config.block_share
        if not gradient_norms or share is None:
            return
        rest, blocks = gradient_norms
        if bool(torch.isfinite(rest) & torch.isfinite(blocks)) and float(blocks) > 0:
            factor = float(share / (1 - share) * rest / blocks)
            is_first = self._last_measured_samples < 0
            self.factor = min(MAX_FACTOR, max(MIN_FACTOR, factor if is_first else (factor * self.factor) ** 0.5))
        self._last_measured_samples = samples

    def state_dict(self) -> dict[str, Any]:
        """The factor, and when it was measured."""
        return {"factor": self.factor, "measured_at": self._last_measured_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.factor, self._last_measured_samples = float(state["factor"]), int(state["measured_at"])


def _gradient_norm(loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """Norm of a loss's gradient over all parameters; the graph is kept."""
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])


def feature_scale(cache: Path, bins: int) -> FeatureScale:
    """Standard deviations of every pooled channel over the training split, in each bin of s."""
    blocks = Table.open(cache).statistics(bins)
    return FeatureScale({block: feature_deviations(statistics) for block, statistics in blocks.items()})


def feature_deviations(statistics: Statistics) -> Float[Tensor, "bins n"]:
    """Those of one block; a bin with fewer than two states takes the deviations of all states."""
    overall = statistics.merge_bins().std()
    return floor_deviations(torch.where(statistics.count > 1, statistics.std(), overall), overall[0]).float()
