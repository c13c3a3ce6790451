"""The process group of a run: device, precision and communication (the only user of accelerate), and its launcher."""

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
from stages.system.signals import unless_nohup
from stages.train.optimizers.partition import ProcessGroup

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Result = TypeVar("Result")
Params = ParamSpec("Params")

PROCESS_GROUP_TIMEOUT = timedelta(days=1)
"""Long, because the others wait while the main process generates pictures; a dead process is noticed at once."""
MIN_LOSS_SCALE = 1.0
REFUSAL_WAIT_SECONDS = 60.0


SHUTDOWN_TIMEOUT_SECONDS = 600
"""Time for the processes to finish a step and a checkpoint after a signal."""
REPORTED_EXIT_CODES = (2, 1)
"""Exit codes of a process that has printed why it ended: a refusal, or an unexpected error."""


class Runtime(ProcessGroup):
    """This process, its device and precision, among `world` processes; the main one, rank 0, alone writes and prints.

    A CPU computes in fp32 whatever the precision. With bf16 and fp16 only the student's forward pass is autocast; its
    weights stay fp32, and fp16's losses are scaled.
    """

    def __init__(self, device: torch.device, precision: Precision = "fp32") -> None:
        """Waits for all processes that a launcher started; each GPU has one."""
        state = PartialState(cpu=device.type == "cpu", timeout=PROCESS_GROUP_TIMEOUT)
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" or state.device.type == "cpu" else precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        has_index = self.world == 1 and device.index is not None
        self.device: torch.device = device if has_index else self.accelerator.device
        self.scaler: torch.amp.GradScaler | None = self.accelerator.scaler

    # The model and its gradient
    def prepare(self, model: nn.Module) -> nn.Module:
        """The model whose forward pass is autocast, and whose backward pass averages gradients over the processes."""
        # The gradient of a 1x1 convolution has other strides than the weight, with the same meaning.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        prepared: nn.Module = self.accelerator.prepare_model(model, device_placement=False)
        return prepared

    def release(self, model: nn.Module) -> None:
        """Undo `prepare`."""
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backward passes within accumulate gradients without averaging them over the processes."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return context

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of a loss, scaled in fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
    ) -> Float[Tensor, ""]:
        """Unscale the gradient and clip it to `max_norm`; returns its norm before."""
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
        """After a gradient that was not finite: halve fp16's loss scale; False if it was at its minimum."""
        if self.scaler is None:
            return False
        scale = self.scaler.get_scale()
        self.scaler.update(max(MIN_LOSS_SCALE, scale / 2))
        return scale > MIN_LOSS_SCALE

    # The other processes
    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, with the same bits on each of them; one message for all, in float64."""
        if self.world == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Overwrite the tensor by that of process `rank`, bit for bit."""
        if self.world > 1:
            torch.distributed.broadcast(tensor, rank)

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def gather(self, items: list[Result]) -> list[Result]:
        """The items of all processes, in the order of their ranks."""
        return list(items) if self.world == 1 else list(gather_object(items))

    def on_main(self, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result:
        """The result of a call on the main process, on every process; the others exit when it fails."""
        if self.world == 1:
            return function(*args, **options)
        message: list[Any] = [None, False]  # the result, and whether the call succeeded
        try:
            if self.is_main:
                message = [function(*args, **options), True]
        finally:
            broadcast_object_list(message)
        if not message[1]:
            raise SystemExit(1)
        result: Result = message[0]
        return result

    def main_first(self, function: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result:
        """Call a function on the main process, then on the others, which find on the disk what it wrote."""
        results: list[Result] = []
        self.on_main(lambda: results.append(function(*args, **options)))
        return results[0] if results else function(*args, **options)

    def print_on_main(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    @contextmanager
    def report_refusal_once(self) -> Iterator[None]:
        """Delay a refusal on all but the main process, so that the launcher ends them before they print the same."""
        try:
            yield
        except Refused:
            if not self.is_main:
                time.sleep(REFUSAL_WAIT_SECONDS)
            raise

    def refusal(self, message: str) -> Refused | SystemExit:
        """The exception for an error that all processes meet: only the main one prints the message."""
        return Refused(message) if self.is_main else SystemExit(1)

    def close(self) -> None:
        """Leave the process group, at the end."""
        self.accelerator.end_training()


def is_launched() -> bool:
    """Whether this process is already one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(config: Strict, command: str, processes: int) -> None:
    """Run a command with this configuration in `processes` processes of one thread each, and wait for their end.

    A signal goes to all of them: the first ends them with a checkpoint, the second at once. When one dies, the others
    are ended too, and `Refused` names it; when this process dies, all of them are ended (`tied_command`).
    """
    with TemporaryDirectory(prefix="sollune-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(resolved_yaml(config, command), encoding="utf-8")
        run_processes(tied_command("stages", command.replace("_", "-"), "--config", str(file)), processes, folder)


def tied_command(module: str, *arguments: str) -> tuple[str, ...]:
    """Arguments of Python that run a module in a process that ends with this one, from before its first import on."""
    return ("-m", "stages.system.tied", str(os.getpid()), module, *arguments)


def run_processes(arguments: Sequence[str], processes: int, log_folder: str) -> None:
    """Run Python with these arguments in a group of processes; `log_folder` is for the launcher.

    Raises `SystemExit` with the exit code after a signal or a failure that was printed, else `Refused`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_SECONDS))
    # torch's launcher handles the signals named here; it would undo `nohup` otherwise.
    handled = [number.name for number in unless_nohup()]
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join([*handled, "SIGQUIT"]))
    for name in logging.root.manager.loggerDict:  # this module prints what is needed
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=log_folder),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as received:
        raise SystemExit(128 + int(received.sigval)) from None
    except ChildFailedError as failed:
        raise _exit_error(failed, processes) from None


def _exit_error(failed: ChildFailedError, processes: int) -> Refused | SystemExit:
    """The exception for processes that ended early: with a code only, if one of them has printed why."""
    failures: dict[int, Any] = failed.failures
    codes = {failure.exitcode for failure in failures.values()}
    if reported := next((code for code in REPORTED_EXIT_CODES if code in codes), None):
        return SystemExit(reported)
    rank, first = failed.get_first_failure()
    code = first.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Refused(
        f"process {rank} of {processes} {how}, so the others were ended too - the last checkpoint is whole; "
        "the same command goes on from it"
    )
