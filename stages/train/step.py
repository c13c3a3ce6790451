"""One step of training."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from stages.nets.student import TIME_SCALE, Prediction
from stages.prompts import derived_seed
from stages.train.ema import decay
from stages.train.journal import StepResult
from stages.train.objective import Losses, Objective
from stages.train.optim import learning_rate, rebalance, set_learning_rate
from stages.train.runtime import Runtime
from stages.train.setup import TrainConfig
from stages.train.state import TrainingState

MAX_NAMED_KEYS = 8


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass the student together, and what was drawn for them."""

    batch: Batch
    time_jitter: Float[Tensor, " b"]
    """what is added to the times that the student is told"""
    guidance_scales: Float[Tensor, " b"]
    """guidance scales of the loss"""


class TrainingStep:
    """One step: forward, loss, backward, update, average.

    Row n of a step lies in chunk n mod (processes x accumulate): a process reads every world-th row, and its
    micro-batches take those in turn. What a step draws is drawn for all rows and dealt out alike, so the chunks are the
    same however many processes share them.
    """

    def __init__(
        self,
        state: TrainingState,
        objective: Objective,
        uncond: Float[Tensor, "1 l d"],
        config: TrainConfig,
        runtime: Runtime,
    ) -> None:
        self.state, self.objective, self.uncond, self.config = state, objective, uncond, config
        self.runtime, self.model = runtime, runtime.prepare(state.student)
        self.static_lambdas = objective.static_lambdas(runtime.device)
        self.parameters = [parameter for parameter in state.student.parameters() if parameter.requires_grad]

    def __call__(self, batch: Batch, data_wait_seconds: float) -> StepResult | None:
        """Learn from this process's rows; None, with no weight changed, when loss or gradient is not finite.

        Raises `Refused` when that is so for the `max_skips`-th time in a row.
        """
        state, config, machine = self.state, self.config, self.runtime
        before, after = state.samples, state.samples + len(batch) * machine.world
        lambdas = state.block_weighter.lambdas(self.static_lambdas)
        block_weight = state.block_term_weight.weight(before / config.max_samples)

        # Forward and backward, chunk by chunk
        state.optimizer.zero_grad(set_to_none=True)
        chunks, losses, heard, measured = self._split_batch(batch), [], [], []
        for chunk in chunks:
            with nullcontext() if chunk is chunks[-1] else machine.no_sync(self.model):
                found, said, norms = self._forward_backward(chunk, lambdas, block_weight)
            losses.append(found)
            heard.append(said)
            measured.append(norms)
        grad_norm = machine.clip(state.optimizer, self.parameters, config.optimizer.clip_norm)

        # What all processes found
        totals = [one.total.detach() for one in losses]
        sums = machine.all_reduce_sum([torch.stack(totals).sum(), *_sum_chunks(measured), *_sum_chunks(heard)])
        loss = float(sums[0]) / (len(chunks) * machine.world)
        state.samples = after
        if not (math.isfinite(loss) and math.isfinite(float(grad_norm))):
            self._record_skip(chunks, losses)
            return None

        # Update; the rate is that of the middle of the batch, so that neither the first nor the last step is lost
        rate = learning_rate(config.optimizer, (before + after) / 2, config.max_samples)
        set_learning_rate(state.optimizer, rate)
        machine.optimizer_step(state.optimizer)
        rebalance(config.optimizer, state.optimizer, before, after)
        state.ema.update(decay(config.ema, before, after))
        with torch.no_grad():
            state.block_term_weight.update(sums[1 : 1 + len(measured[0])], before)
            state.block_weighter.update(sums[1 + len(measured[0]) :], after - before)
        self._record_spike(loss, batch)
        s = torch.cat([chunk.batch.s for chunk in chunks])
        groups = [chunk.batch.group for chunk in chunks if chunk.batch.group is not None]
        group = torch.cat(groups) if groups else None
        return StepResult(
            Losses.merge_chunks(losses), lambdas, block_weight, s, grad_norm, rate, data_wait_seconds, group
        )

    def _split_batch(self, batch: Batch) -> list[MicroBatch]:
        """The chunks of this process, with draws that depend on the samples' numbers alone."""
        device, world, count = self.runtime.device, self.runtime.world, self.config.accumulate
        generator = torch.Generator().manual_seed(derived_seed("train", self.config.seed, self.state.samples))
        jitter = sample_time_jitter(len(batch) * world, self.config.embedding_jitter, generator)
        scales = self.objective.sample_guidance_scales(len(batch) * world, generator)
        batch = batch.to(device, torch.float32)
        dealt = [slice(self.runtime.rank + number * world, None, count * world) for number in range(count)]
        rows = [batch.rows(slice(number, None, count)) for number in range(count)]
        return [
            MicroBatch(own, jitter[of].to(device), scales[of].to(device)) for own, of in zip(rows, dealt, strict=True)
        ]

    def _forward_backward(
        self, chunk: MicroBatch, lambdas: Float[Tensor, " n_blocks"], block_weight: float
    ) -> tuple[Losses, Sequence[Tensor], Sequence[Tensor]]:
        """The losses of a chunk, whose gradient is added up; what the judge heard, and what the penalty measured."""
        state, rows, samples = self.state, chunk.batch, self.state.samples
        output: Prediction = self.model(rows.x_t, rows.s + chunk.time_jitter, rows.cond, self.uncond)
        with torch.no_grad():
            omega = state.block_weighter.importance_weight(rows)
            heard = state.block_weighter.observe(rows, output, omega)
        losses = self.objective(output, rows, lambdas, block_weight, chunk.guidance_scales, omega)
        measured = state.block_term_weight.measure(losses, samples / self.config.max_samples, samples, self.parameters)
        self.runtime.backward(losses.total / self.config.accumulate)
        return losses, heard, measured

    def _record_skip(self, chunks: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        """Write down the samples that are not finite, or all of them when none is so by itself."""
        scaled = self.runtime.reduce_loss_scale()
        in_a_row = self.state.anomalies.count_skip(is_consecutive=not scaled)
        bad = [not ok for one in losses for ok in torch.isfinite(one.flow_errors).tolist()]
        found = self.runtime.gather(list(zip((key for c in chunks for key in c.batch.keys), bad, strict=True)))
        keys = [key for key, is_bad in found if is_bad] or [key for key, _ in found]
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
    """What is added to the times that a student is told, drawn on the CPU from +-jitter / 1000.

    Ordinary samplers truncate 1000 s to an integer, so it learns not to mind.
    """
    return (jitter / TIME_SCALE) * (2 * torch.rand(count, generator=generator) - 1)


def _sum_chunks(columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sums over the chunks, each of which brings the same tensors."""
    return [torch.stack(list(column)).sum(dim=0) for column in zip(*columns, strict=True)]
