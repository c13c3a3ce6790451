"""One step of training."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from stages.nets.student import TIME_SCALE, StudentOutput
from stages.prompts import derived_seed
from stages.train.balance import balance
from stages.train.config import TrainConfig
from stages.train.ema import decay
from stages.train.journal import Step
from stages.train.machine import Machine
from stages.train.objective import Losses, Objective
from stages.train.optim import learning_rate, set_learning_rate
from stages.train.state import TrainingState

NAMED_KEYS = 8


@dataclass(frozen=True)
class Chunk:
    """Rows that pass the student together, and what was drawn for them."""

    rows: Batch
    jitter: Float[Tensor, " b"]
    """what is added to the times that the student is told"""
    scales: Float[Tensor, " b"]
    """guidance scales of the loss"""


class Stepper:
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
        machine: Machine,
    ) -> None:
        self.state, self.objective, self.uncond, self.config = state, objective, uncond, config
        self.machine, self.model = machine, machine.prepare(state.student)
        self.static = objective.static_lambdas(machine.device)
        self.parameters = [parameter for parameter in state.student.parameters() if parameter.requires_grad]

    def __call__(self, batch: Batch, data_wait_seconds: float) -> Step | None:
        """Learn from this process's rows; None, with no weight changed, when loss or gradient is not finite.

        Raises `Refused` when that is so for the `max_skips`-th time in a row.
        """
        state, config, machine = self.state, self.config, self.machine
        before, after = state.samples, state.samples + len(batch) * machine.world
        lambdas = state.judge.lambdas(self.static)
        block_weight = state.penalty.weight(before / config.max_samples)

        # Forward and backward, chunk by chunk
        state.optimizer.zero_grad(set_to_none=True)
        chunks, losses, heard, measured = self._dealt(batch), [], [], []
        for chunk in chunks:
            with nullcontext() if chunk is chunks[-1] else machine.alone(self.model):
                found, said, norms = self._learnt_from(chunk, lambdas, block_weight)
            losses.append(found)
            heard.append(said)
            measured.append(norms)
        grad_norm = machine.clip(state.optimizer, self.parameters, config.optimizer.clip_norm)

        # What all processes found
        totals = [one.total.detach() for one in losses]
        sums = machine.sum([torch.stack(totals).sum(), *_added(measured), *_added(heard)])
        loss = float(sums[0]) / (len(chunks) * machine.world)
        state.samples = after
        if not (math.isfinite(loss) and math.isfinite(float(grad_norm))):
            self._skip(chunks, losses)
            return None

        # Update; the rate is that of the middle of the batch, so that neither the first nor the last step is lost
        rate = learning_rate(config.optimizer, (before + after) / 2, config.max_samples)
        set_learning_rate(state.optimizer, rate)
        machine.update(state.optimizer)
        balance(config.optimizer, state.optimizer, before, after)
        state.ema.update(decay(config.ema, before, after))
        with torch.no_grad():
            state.penalty.learn(sums[1 : 1 + len(measured[0])], before)
            state.judge.learn(sums[1 + len(measured[0]) :], after - before)
        self._look_for_a_spike(loss, batch)
        s = torch.cat([chunk.rows.s for chunk in chunks])
        groups = [chunk.rows.group for chunk in chunks if chunk.rows.group is not None]
        group = torch.cat(groups) if groups else None
        return Step(Losses.joined(losses), lambdas, block_weight, s, grad_norm, rate, data_wait_seconds, group)

    def _dealt(self, batch: Batch) -> list[Chunk]:
        """The chunks of this process, with draws that depend on the samples' numbers alone."""
        device, world, count = self.machine.device, self.machine.world, self.config.accumulate
        generator = torch.Generator().manual_seed(derived_seed("train", self.config.seed, self.state.samples))
        jitter = time_jitter(len(batch) * world, self.config.embedding_jitter, generator)
        scales = self.objective.guidance_scales(len(batch) * world, generator)
        batch = batch.to(device, torch.float32)
        dealt = [slice(self.machine.rank + number * world, None, count * world) for number in range(count)]
        rows = [batch.rows(slice(number, None, count)) for number in range(count)]
        return [Chunk(own, jitter[of].to(device), scales[of].to(device)) for own, of in zip(rows, dealt, strict=True)]

    def _learnt_from(
        self, chunk: Chunk, lambdas: Float[Tensor, " n_blocks"], block_weight: float
    ) -> tuple[Losses, Sequence[Tensor], Sequence[Tensor]]:
        """The losses of a chunk, whose gradient is added up; what the judge heard, and what the penalty measured."""
        state, rows, samples = self.state, chunk.rows, self.state.samples
        output: StudentOutput = self.model(rows.x_t, rows.s + chunk.jitter, rows.cond, self.uncond)
        with torch.no_grad():
            omega = state.judge.omega(rows)
            heard = state.judge.hear(rows, output, omega)
        losses = self.objective(output, rows, lambdas, block_weight, chunk.scales, omega)
        measured = state.penalty.measure(losses, samples / self.config.max_samples, samples, self.parameters)
        self.machine.backward(losses.total / self.config.accumulate)
        return losses, heard, measured

    def _skip(self, chunks: Sequence[Chunk], losses: Sequence[Losses]) -> None:
        """Write down the samples that are not finite, or all of them when none is so by itself."""
        scaled = self.machine.back_off()
        in_a_row = self.state.mishaps.skip(counts=not scaled)
        bad = [not ok for one in losses for ok in torch.isfinite(one.flow_errors).tolist()]
        found = self.machine.gather(list(zip((key for c in chunks for key in c.rows.keys), bad, strict=True)))
        keys = [key for key, is_bad in found if is_bad] or [key for key, _ in found]
        self.state.mishaps.note(self.state.samples, "non_finite", keys, in_a_row=in_a_row)
        if in_a_row >= self.config.max_skips:
            named = ", ".join(keys[:NAMED_KEYS])
            more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
            raise self.machine.refuse(
                f"training: loss or gradient is not finite {in_a_row} times in a row, up to sample "
                f"{self.state.samples}, last at {named}{more} - the last checkpoint is whole; look at these records "
                "or lower optimizer.learning_rate in a new run folder"
            )

    def _look_for_a_spike(self, loss: float, batch: Batch) -> None:
        usual = self.state.mishaps.see(loss)
        if usual is not None:
            keys = self.machine.gather(list(batch.keys))
            self.state.mishaps.note(self.state.samples, "spike", keys, loss=loss, usual=usual)


def time_jitter(count: int, jitter: float, generator: torch.Generator) -> Float[Tensor, " b"]:
    """What is added to the times that a student is told, drawn on the CPU from +-jitter / 1000.

    Ordinary samplers truncate 1000 s to an integer, so it learns not to mind.
    """
    return (jitter / TIME_SCALE) * (2 * torch.rand(count, generator=generator) - 1)


def _added(columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Sums over the chunks, each of which brings the same tensors."""
    return [torch.stack(list(column)).sum(dim=0) for column in zip(*columns, strict=True)]
