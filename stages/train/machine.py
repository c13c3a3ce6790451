"""The processes that train together, where this one computes and how precisely: the one door to accelerate."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from jaxtyping import Float
from torch import Tensor, nn

from configs.refusal import Refused

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Made = TypeVar("Made")
Asked = ParamSpec("Asked")

LONGEST_WAIT = timedelta(days=1)
"""A process that dies is noticed at once; this is for one that draws while the others wait."""
LEAST_SCALE = 1.0
REFUSAL_SECONDS = 60.0


class Machine:
    """This process among `world`, of which the first is the main one: it alone writes, prints and draws.

    fp32 on a CPU whatever the precision. With bf16 and fp16 only the student's forward pass is autocast; its weights
    stay fp32, and fp16's losses are scaled.
    """

    def __init__(self, device: torch.device, precision: Precision = "fp32") -> None:
        """Processes that a launcher started together meet here; each GPU has one."""
        self.accelerator = _accelerator(device.type, precision)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        chosen = self.world == 1 and device.index is not None
        self.device: torch.device = device if chosen else self.accelerator.device
        self.scaler: torch.amp.GradScaler | None = self.accelerator.scaler

    # The model and its gradient
    def prepare(self, model: nn.Module) -> nn.Module:
        """The model whose forward pass is autocast, and whose backward pass averages gradients over the processes."""
        # The gradient of a 1x1 convolution names its strides otherwise than the weight; they mean the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        prepared: nn.Module = self.accelerator.prepare_model(model, device_placement=False)
        return prepared

    def release(self, model: nn.Module) -> None:
        """Let go of a prepared model, whose module is then as it was."""
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """Passes of which nothing is told to the other processes yet."""
        apart: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return apart

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of a loss, scaled where it would vanish in fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], most: float
    ) -> Float[Tensor, ""]:
        """Take the scale out of the gradient, shorten it to the norm `most`, and say which norm it had."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, most)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer on a clipped, finite gradient."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def back_off(self) -> bool:
        """After a gradient that was not finite: halve fp16's scale; whether there was anything left to halve."""
        if self.scaler is None:
            return False
        scale = self.scaler.get_scale()
        self.scaler.update(max(LEAST_SCALE, scale / 2))
        return scale > LEAST_SCALE

    # The other processes
    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, the same bits on each of them; one message for all, in float64."""
        if self.world == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(one.shape).to(one.dtype) for part, one in zip(parts, tensors, strict=True)]

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Overwrite the tensor by that of process `rank`, bit for bit."""
        if self.world > 1:
            torch.distributed.broadcast(tensor, rank)

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def gather(self, things: list[Made]) -> list[Made]:
        """What all processes hold, one after the other."""
        return list(things) if self.world == 1 else list(gather_object(things))

    def on_main(self, act: Callable[Asked, Made], *args: Asked.args, **options: Asked.kwargs) -> Made:
        """What `act` gives on the main process, on every one; the others wait for it, and leave when it fails."""
        if self.world == 1:
            return act(*args, **options)
        told: list[Any] = [None, False]
        try:
            if self.is_main:
                told = [act(*args, **options), True]
        finally:
            broadcast_object_list(told)
        if not told[1]:
            raise SystemExit(1)
        made: Made = told[0]
        return made

    def main_first(self, act: Callable[Asked, Made], *args: Asked.args, **options: Asked.kwargs) -> Made:
        """`act` on every process, on the main one before the others, who then find on the disk what it left."""
        made: list[Made] = []
        self.on_main(lambda: made.append(act(*args, **options)))
        return made[0] if made else act(*args, **options)

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    @contextmanager
    def one_refusal(self) -> Iterator[None]:
        """Let the main process alone say what all of them find wrong; the launcher ends the others meanwhile."""
        try:
            yield
        except Refused:
            if not self.is_main:
                time.sleep(REFUSAL_SECONDS)  # long enough for the main one, should it find the same
            raise

    def refuse(self, message: str) -> Refused | SystemExit:
        """What every process raises when all of them found the same: the main one says why."""
        return Refused(message) if self.is_main else SystemExit(1)

    def rows(self, batch_size: int, accumulate: int) -> int:
        """This process's rows of a batch; raises `Refused` unless each micro-batch of each process gets as many."""
        if slip := uneven(batch_size, self.world, accumulate):
            raise self.refuse(slip)
        return batch_size // self.world

    def close(self) -> None:
        """Part from the other processes, at the end."""
        self.accelerator.end_training()


def uneven(batch_size: int, world: int, accumulate: int) -> str | None:
    """Why a batch cannot be shared among so many processes and micro-batches; None when it can."""
    if batch_size % (world * accumulate) == 0:
        return None
    return (
        f"train.batch_size = {batch_size}: does not divide among {world} processes x train.accumulate = "
        f"{accumulate} micro-batches - choose a multiple of {world * accumulate}"
    )


def _accelerator(kind: str, precision: Precision) -> Accelerator:
    state = PartialState(cpu=kind == "cpu", timeout=LONGEST_WAIT)
    mixed = "no" if precision == "fp32" or state.device.type == "cpu" else precision
    return Accelerator(
        cpu=kind == "cpu",
        mixed_precision=mixed,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
