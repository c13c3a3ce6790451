"""One step of training: forward, loss, backward, update, average."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from stages.nets.student import TIME_SCALE, Prediction, Student
from stages.prompts import derived_seed
from stages.train.ema import decay
from stages.train.losses import Losses, StepResult
from stages.train.objective import Objective
from stages.train.optim import learning_rate, rebalance, set_learning_rate
from stages.train.runtime import Runtime
from stages.train.setup import TrainConfig
from stages.train.state import TrainingState

MAX_NAMED_KEYS = 8
Targets: TypeAlias = Callable[[Student, Batch], Batch]
"""The rows with those targets that depend on the present student, which gets no gradient from them."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, and the random numbers for them."""

    batch: Batch
    time_jitter: Float[Tensor, " b"]
    """added to the student's time input s"""
    guidance_scales: Float[Tensor, " b"]
    """guidance scales w of the loss"""


class TrainingStep:
    """One step on a batch.

    Row n of a step lies in micro-batch n mod (processes x accumulate): a process reads every world-th row, and its
    micro-batches take those in turn. Random numbers are drawn for all rows and split alike, so the micro-batches are
    the same however many processes share them.
    """

    def __init__(
        self,
        state: TrainingState,
        objective: Objective,
        uncond: Float[Tensor, "1 l d"],
        config: TrainConfig,
        runtime: Runtime,
        targets: Targets | None = None,
    ) -> None:
        self.targets = targets
        self.state, self.objective, self.uncond, self.config = state, objective, uncond, config
        self.runtime, self.model = runtime, runtime.prepare(state.student)
        self.parameters = [parameter for parameter in state.student.parameters() if parameter.requires_grad]

    def __call__(self, batch: Batch, data_wait_seconds: float) -> StepResult | None:
        """Train on this process's rows; None, with no weight changed, when loss or gradient is not finite.

        Raises `Refused` after `max_skips` such steps in a row.
        """
        state, config, runtime = self.state, self.config, self.runtime
        before, after = state.samples, state.samples + len(batch) * runtime.world
        lambdas = state.block_weighter.lambdas()
        block_weight = state.block_term_weight.weight(before / config.max_samples)

        # Forward and backward, one micro-batch after the other
        state.optimizer.zero_grad(set_to_none=True)
        chunks, losses, observations, gradient_norms = self._split_batch(batch), [], [], []
        for chunk in chunks:
            with nullcontext() if chunk is chunks[-1] else runtime.no_sync(self.model):
                chunk_losses, observed, norms = self._forward_backward(chunk, lambdas, block_weight)
            losses.append(chunk_losses)
            observations.append(observed)
            gradient_norms.append(norms)
        grad_norm = runtime.clip(state.optimizer, self.parameters, config.optimizer.clip_norm)

        # Sums over the micro-batches of all processes
        total = torch.stack([chunk_losses.total.detach() for chunk_losses in losses]).sum()
        sums = runtime.all_reduce_sum([total, *_sum_chunks(gradient_norms), *_sum_chunks(observations)])
        loss = float(sums[0]) / (len(chunks) * runtime.world)
        state.samples = after
        if not (math.isfinite(loss) and math.isfinite(float(grad_norm))):
            self._record_skip(chunks, losses)
            return None

        # Update; the rate is that of the middle of the batch, so that neither the first nor the last step is lost
        rate = learning_rate(config.optimizer, (before + after) / 2, config.max_samples)
        set_learning_rate(state.optimizer, rate)
        runtime.optimizer_step(state.optimizer)
        rebalance(config.optimizer, state.optimizer, before, after)
        state.ema.update(decay(config.ema, before, after))
        norm_count = len(gradient_norms[0])
        with torch.no_grad():
            state.block_term_weight.update(sums[1 : 1 + norm_count], before)
            state.block_weighter.update(sums[1 + norm_count :], after - before)
        self._record_spike(loss, batch)
        s = torch.cat([chunk.batch.s for chunk in chunks])
        groups = [chunk.batch.group for chunk in chunks if chunk.batch.group is not None]
        group = torch.cat(groups) if groups else None
        return StepResult(
            Losses.merge_chunks(losses),
            lambdas,
            block_weight,
            s,
            grad_norm,
            rate,
            data_wait_seconds,
            group,
            batch.size,
        )

    def _split_batch(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of this process, with random numbers that depend on the sample numbers alone."""
        device, rank, world, count = self.runtime.device, self.runtime.rank, self.runtime.world, self.config.accumulate
        generator = torch.Generator().manual_seed(derived_seed("train", self.config.seed, self.state.samples))
        jitter = sample_time_jitter(len(batch) * world, self.config.embedding_jitter, generator)
        scales = self.objective.sample_guidance_scales(len(batch) * world, generator)
        batch = batch.to(device, torch.float32)
        chunks = []
        for number in range(count):
            own, among_all = slice(number, None, count), slice(rank + number * world, None, count * world)
            chunks.append(MicroBatch(batch.rows(own), jitter[among_all].to(device), scales[among_all].to(device)))
        return chunks

    def _forward_backward(
        self, chunk: MicroBatch, lambdas: Float[Tensor, " n_blocks"], block_weight: float
    ) -> tuple[Losses, Sequence[Tensor], Sequence[Tensor]]:
        """A micro-batch's losses, after its gradient is added; the assessor's observations and the gradient norms."""
        state, rows, samples = self.state, chunk.batch, self.state.samples
        if self.targets is not None:
            rows = self.targets(cast(Student, state.student), rows)
        # The scale is an input of the network where the rows have one: as a reader with landings gives them.
        guidance = () if rows.guidance_scale is None else (rows.guidance_scale,)
        output: Prediction = self.model(rows.x_s, rows.s + chunk.time_jitter, rows.cond, self.uncond, *guidance)
        with torch.no_grad():
            weight = state.block_weighter.importance_weight(rows)
            observations = state.block_weighter.observe(rows, output, weight)
        losses = self.objective(output, rows, lambdas, block_weight, chunk.guidance_scales, weight)
        norms = state.block_term_weight.measure(losses, samples / self.config.max_samples, samples, self.parameters)
        self.runtime.backward(losses.total / self.config.accumulate)
        return losses, observations, norms

    def _record_skip(self, chunks: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        """Record the samples whose flow error is not finite, or all samples when each one is finite."""
        scale_reduced = self.runtime.reduce_loss_scale()
        in_a_row = self.state.anomalies.count_skip(is_consecutive=not scale_reduced)
        finite = [ok for chunk_losses in losses for ok in torch.isfinite(chunk_losses.flow_errors).tolist()]
        own = list(zip((key for chunk in chunks for key in chunk.batch.keys), finite, strict=True))
        samples = self.runtime.gather(own)
        keys = [key for key, is_finite in samples if not is_finite] or [key for key, _ in samples]
        self.state.anomalies.write_event(self.state.samples, "non_finite", keys, in_a_row=in_a_row)
        if in_a_row >= self.config.max_skips:
            named = ", ".join(keys[:MAX_NAMED_KEYS])
            more = f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else ""
            raise self.runtime.refusal(
                f"training: loss or gradient is not finite {in_a_row} times in a row, up to sample "
                f"{self.state.samples}, last at {named}{more} - the last checkpoint is whole; look at these records "
                "or lower optimizer.learning_rate in a new run folder"
            )

    def _record_spike(self, loss: float, batch: Batch) -> None:
        usual = self.state.anomalies.add_loss(loss)
        if usual is not None:
            keys = self.runtime.gather(list(batch.keys))
            self.state.anomalies.write_event(self.state.samples, "spike", keys, loss=loss, usual=usual)


def sample_time_jitter(count: int, jitter: float, generator: torch.Generator) -> Float[Tensor, " b"]:
    """Noise on the student's time input, uniform in +-jitter / 1000, drawn on the CPU.

    Ordinary samplers truncate 1000 s to an integer; this makes the student robust to it.
    """
    return (jitter / TIME_SCALE) * (2 * torch.rand(count, generator=generator) - 1)


def _sum_chunks(columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sums over the micro-batches, each of which has the same list of tensors."""
    return [torch.stack(list(column)).sum(dim=0) for column in zip(*columns, strict=True)]
