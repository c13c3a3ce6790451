"""One step of training."""

from contextlib import AbstractContextManager
from typing import Literal, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.refusal import Refused
from shards.batch import Batch
from stages.nets.student import TIME_SCALE, StudentOutput
from stages.prompts import derived_seed
from stages.train.balance import balance
from stages.train.config import TrainConfig
from stages.train.ema import decay
from stages.train.journal import Step
from stages.train.objective import Objective
from stages.train.optim import learning_rate, set_learning_rate
from stages.train.state import TrainingState

NAMED_KEYS = 8


class Stepper:
    """One step: forward, loss, backward, update, average."""

    def __init__(
        self,
        state: TrainingState,
        objective: Objective,
        uncond: Float[Tensor, "1 l d"],
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.state, self.objective, self.uncond, self.config, self.device = state, objective, uncond, config, device
        self.static = objective.static_lambdas(device)
        self.parameters = [parameter for parameter in state.student.parameters() if parameter.requires_grad]

    def __call__(self, batch: Batch, data_wait_seconds: float) -> Step:
        """Learn from one batch; raises `Refused`, with no weight changed, when loss or gradient is not finite."""
        state, config = self.state, self.config
        generator = torch.Generator().manual_seed(derived_seed("train", config.seed, state.samples))
        batch = batch.to(self.device, torch.float32)
        after = state.samples + len(batch.keys)

        # Forward
        told = told_time(batch.s, config.embedding_jitter, generator)
        with autocast(self.device, config.precision):
            output: StudentOutput = state.student(batch.x_t, told, batch.cond, self.uncond)
        with torch.no_grad():
            omega = state.judge.omega(batch)
            lambdas = state.judge.lambdas(batch, output, self.static)
        progress = state.samples / config.max_samples
        block_weight = state.penalty.weight(progress)
        losses = self.objective(output, batch, lambdas, block_weight, generator, omega)
        state.penalty.look(losses, progress, state.samples, self.parameters)

        # Backward
        state.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip_norm)
        if not bool(torch.isfinite(losses.total.detach() + grad_norm)):
            _refuse_non_finite(batch, losses.flow_errors, state.samples)

        # Update; the rate is that of the middle of the batch, so that neither the first nor the last step is lost
        rate = learning_rate(config.optimizer, (state.samples + after) / 2, config.max_samples)
        set_learning_rate(state.optimizer, rate)
        state.optimizer.step()
        balance(config.optimizer, state.optimizer, state.samples, after)
        state.ema.update(decay(config.ema, state.samples, after))
        state.samples = after
        return Step(losses, lambdas, block_weight, batch.s, grad_norm, rate, data_wait_seconds)


def told_time(s: Float[Tensor, " b"], jitter: float, generator: torch.Generator) -> Float[Tensor, " b"]:
    """The times that the student is told: ordinary samplers truncate 1000 s to an integer, so it learns not to mind."""
    drawn = 2 * torch.rand(len(s), generator=generator) - 1
    return s + (jitter / TIME_SCALE) * drawn.to(s.device)


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> AbstractContextManager[None]:
    """The one place where the precision of the forward pass is decided."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and device.type != "cpu")


def _refuse_non_finite(batch: Batch, flow_errors: Float[Tensor, " b"], samples: int) -> NoReturn:
    """Name the samples that are not finite, or the batch when none of them is so by itself."""
    bad = (~torch.isfinite(flow_errors)).nonzero().flatten().tolist() or range(len(batch.keys))
    keys = [batch.keys[i] for i in bad]
    named = ", ".join(keys[:NAMED_KEYS]) + (f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else "")
    raise Refused(
        f"training: loss or gradient is not finite after {samples} samples, at {named} - "
        "the last checkpoint is whole; look at these records or lower optimizer.learning_rate in a new run folder"
    )
