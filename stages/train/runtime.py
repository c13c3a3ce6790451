"""The processes that train together, where this one computes and how precisely: the one door to accelerate.

Several processes for one story, on this machine: torch's elastic launcher starts them and passes signals on.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar
from uuid import uuid4

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from configs.load import resolved_yaml
from configs.values import Strict
from stages.system.refusal import Refused
from stages.system.signals import SIGNALS, is_ignored

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Result = TypeVar("Result")
Params = ParamSpec("Params")

PROCESS_GROUP_TIMEOUT = timedelta(days=1)
"""A process that dies is noticed at once; this is for one that draws while the others wait."""
MIN_LOSS_SCALE = 1.0
REFUSAL_WAIT_SECONDS = 60.0


class Runtime:
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

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Passes of which nothing is told to the other processes yet."""
        apart: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return apart

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of a loss, scaled where it would vanish in fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
    ) -> Float[Tensor, ""]:
        """Take the scale out of the gradient, shorten it to the norm `most`, and say which norm it had."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer on a clipped, finite gradient."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def reduce_loss_scale(self) -> bool:
        """After a gradient that was not finite: halve fp16's scale; whether there was anything left to halve."""
        if self.scaler is None:
            return False
        scale = self.scaler.get_scale()
        self.scaler.update(max(MIN_LOSS_SCALE, scale / 2))
        return scale > MIN_LOSS_SCALE

    # The other processes
    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
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

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def gather(self, items: list[Result]) -> list[Result]:
        """What all processes hold, one after the other."""
        return list(items) if self.world == 1 else list(gather_object(items))

    def on_main(self, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result:
        """What `act` gives on the main process, on every one; the others wait for it, and leave when it fails."""
        if self.world == 1:
            return function(*args, **options)
        told: list[Any] = [None, False]
        try:
            if self.is_main:
                told = [function(*args, **options), True]
        finally:
            broadcast_object_list(told)
        if not told[1]:
            raise SystemExit(1)
        made: Result = told[0]
        return made

    def main_first(self, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result:
        """`act` on every process, on the main one before the others, who then find on the disk what it left."""
        made: list[Result] = []
        self.on_main(lambda: made.append(function(*args, **options)))
        return made[0] if made else function(*args, **options)

    def print_on_main(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    @contextmanager
    def report_refusal_once(self) -> Iterator[None]:
        """Let the main process alone say what all of them find wrong; the launcher ends the others meanwhile."""
        try:
            yield
        except Refused:
            if not self.is_main:
                time.sleep(REFUSAL_WAIT_SECONDS)  # long enough for the main one, should it find the same
            raise

    def refusal(self, message: str) -> Refused | SystemExit:
        """What every process raises when all of them found the same: the main one says why."""
        return Refused(message) if self.is_main else SystemExit(1)

    def local_batch_size(self, batch_size: int, accumulate: int) -> int:
        """This process's rows of a batch; raises `Refused` unless each micro-batch of each process gets as many."""
        if slip := batch_split_error(batch_size, self.world, accumulate):
            raise self.refusal(slip)
        return batch_size // self.world

    def close(self) -> None:
        """Part from the other processes, at the end."""
        self.accelerator.end_training()


def batch_split_error(batch_size: int, world: int, accumulate: int) -> str | None:
    """Why a batch cannot be shared among so many processes and micro-batches; None when it can."""
    if batch_size % (world * accumulate) == 0:
        return None
    return (
        f"train.batch_size = {batch_size}: does not divide among {world} processes x train.accumulate = "
        f"{accumulate} micro-batches - choose a multiple of {world * accumulate}"
    )


def _accelerator(device_type: str, precision: Precision) -> Accelerator:
    state = PartialState(cpu=device_type == "cpu", timeout=PROCESS_GROUP_TIMEOUT)
    mixed = "no" if precision == "fp32" or state.device.type == "cpu" else precision
    return Accelerator(
        cpu=device_type == "cpu",
        mixed_precision=mixed,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


SHUTDOWN_TIMEOUT_SECONDS = 600
"""How long the processes have to finish a step and a checkpoint once they were asked to leave."""
REPORTED_EXIT_CODES = (2, 1)
"""Exit codes of a process that said itself why it ended: it was refused, or failed as nobody foresaw."""


def is_launched() -> bool:
    """Whether this process is one of several already, whoever started them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(config: Strict, command: str, processes: int) -> None:
    """Run a story with this configuration in so many processes of one thread each, and wait for their end.

    A signal goes to all of them: the first asks them to leave with a checkpoint, the second ends them at once. When one
    dies, the others are ended too, and `Refused` says which it was; when this one dies, all of them are (`tied`).
    """
    with TemporaryDirectory(prefix="sollune-") as folder:
        asked = Path(folder) / "config.yaml"
        asked.write_text(resolved_yaml(config, command), encoding="utf-8")
        run_processes(tied_command("stages", command.replace("_", "-"), "--config", str(asked)), processes, folder)


def tied_command(module: str, *arguments: str) -> tuple[str, ...]:
    """Words for Python that run a module in a process that ends with this one, from before its first import on."""
    return ("-m", "stages.system.tied", str(os.getpid()), module, *arguments)


def run_processes(arguments: Sequence[str], processes: int, log_folder: str) -> None:
    """Run Python with these words in so many processes that know of each other; `folder` is for the launcher's notes.

    Raises what is left to say of their end: `SystemExit` with its code after a signal or a refusal, else `Refused`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_SECONDS))
    # The launcher of torch passes on whichever signals it is told to, and would undo `nohup` otherwise.
    passed = [number.name for number in SIGNALS if not is_ignored(number)]
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join([*passed, "SIGQUIT"]))
    for name in logging.root.manager.loggerDict:  # what there is to say is said here
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(_launch_config(processes, log_folder), sys.executable)(*arguments)
    except SignalException as told:
        raise SystemExit(128 + int(told.sigval)) from None
    except ChildFailedError as failed:
        raise _exit_error(failed, processes) from None


def _launch_config(processes: int, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


def _exit_error(failed: ChildFailedError, processes: int) -> Refused | SystemExit:
    """What is left to say of processes that ended before their time."""
    ended: dict[int, Any] = failed.failures
    codes = {failure.exitcode for failure in ended.values()}
    if said := next((code for code in REPORTED_EXIT_CODES if code in codes), None):
        return SystemExit(said)
    rank, first = failed.get_first_failure()
    code = first.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Refused(
        f"process {rank} of {processes} {how}, so the others were ended too - the last checkpoint is whole; "
        "the same command goes on from it"
    )
