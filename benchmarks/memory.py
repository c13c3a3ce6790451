"""What training needs on a card: `python -m benchmarks.memory [--config A.yaml --config B.yaml] [--size 512x768]`.

By default configs/sd15.yaml under each of configs/cards, at SD1.5's own picture size. With `--processes 4` it is what
the fullest of 4 processes needs, each with a card of its own. Only bytes are computed: one micro-batch runs forward and
backward on tensors without content, and every storage is counted while it is held, checkpointing and autocast included.
Not counted: the card's own context, the allocator's gaps, workspaces of convolutions, messages between processes.
"""

import argparse
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks import full_size
from configs.load import load
from configs.values import PictureSize
from stages.distill import Config
from stages.nets.student import Student
from stages.train.optim import build_optimizer, uses_muon
from stages.train.optimizers.partition import Partitioned, ProcessGroup
from stages.train.setup import TrainConfig, batch_split_error

GIB = 2**30
NATIVE_SIZE = PictureSize(512, 512)
BASE, CARDS = Path("configs/sd15.yaml"), Path("configs/cards")
QUANTISED_FROM, QUANTISED_BLOCK = 4096, 256
"""bitsandbytes: a smaller tensor keeps 32-bit moments; each block of numbers has one scale of 4 bytes."""


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that were allocated in this mode and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes, self.peak_bytes = 0, 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result, with its storages counted."""
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count_storage, result)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return result

    def count_storage(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self._held:
            self._held[place] = weakref.ref(storage, lambda _: self._release(place, size))
            self.current_bytes += size

    def _release(self, place: int, size: int) -> None:
        del self._held[place]
        self.current_bytes -= size


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the card at the peak of a step."""

    weights: int
    gradients: int
    moments: int
    average: int
    working: int
    """activations, and the weights' copies in autocast's precision"""
    teacher: int
    """in fp32, for the comparison grids: unet, vae and text encoder"""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Networks:
    """Makes the networks of a teacher, and the shape of its conditioning."""

    unet: Callable[[], Any] = full_size.unet
    vae: Callable[[], Any] = full_size.vae
    text_encoder: Callable[[], Any] = full_size.text_encoder
    prompt: tuple[int, int] = (77, full_size.CONTEXT)


def memory_use(
    config: TrainConfig, size: PictureSize, networks: Networks | None = None, processes: int = 1
) -> MemoryUse:
    """The parts for the fullest process with a card of its own, in a step on pictures of this size.

    The networks are SD1.5's by default.
    """
    networks = networks or Networks()
    with FakeTensorMode():
        student = Student(networks.unet()).train()
        weights = size_of(student)
        moments = held_moment_bytes(config, dict(student.named_parameters()), processes)
        working = working_bytes(student, config, size, networks.prompt, processes)
        teacher = weights + size_of(networks.vae()) + size_of(networks.text_encoder())
    return MemoryUse(weights, weights, moments, weights, working, teacher)


def size_of(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def held_moment_bytes(config: TrainConfig, parameters: Mapping[str, nn.Parameter], processes: int) -> int:
    """Bytes of the moments that the fullest of so many processes keeps."""
    sizes = {name: moment_bytes(name, p, config.optimizer.kind) for name, p in parameters.items()}
    if processes == 1 or not config.shares_moments:
        return sum(sizes.values())
    group = ProcessGroup()
    group.world = processes
    optimizer = build_optimizer(config.optimizer, parameters, group, config.shard_moments)
    parts = [optimizer, *getattr(optimizer, "optimizers", {}).values()]
    partition = next(part.partition for part in parts if isinstance(part, Partitioned))
    return max(partition.loads) + sum(size for name, size in sizes.items() if parameters[name] not in partition)


def moment_bytes(name: str, parameter: nn.Parameter, kind: str) -> int:
    """Bytes of AdamW's two moments of a parameter, or of Muon's one."""
    numbers = parameter.numel()
    if kind == "muon" and uses_muon(name, parameter):
        return 4 * numbers
    if kind == "adamw_8bit" and numbers >= QUANTISED_FROM:
        return 2 * (numbers + 4 * -(-numbers // QUANTISED_BLOCK))
    return 2 * 4 * numbers


def working_bytes(
    student: Student, config: TrainConfig, size: PictureSize, prompt: tuple[int, int], processes: int = 1
) -> int:
    """The most that a micro-batch holds beside weights and gradients; gradients exist from the step before."""
    if config.gradient_checkpointing:
        student.unet.enable_gradient_checkpointing()
    if config.precision != "fp32":
        compute_norms_in_fp32(student)
    rows, latent = config.rows_of(size) // (config.accumulate * processes), (4, size.height // 8, size.width // 8)
    with StorageCounter() as live:
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
            live.count_storage(parameter)
        before = live.current_bytes
        x, s, cond = torch.zeros(rows, *latent), torch.zeros(rows), torch.zeros(rows, *prompt)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision != "fp32"):
            output = student(x, s, cond, torch.zeros(1, *prompt))
        parts = [output.v_cond, output.v_uncond, *output.features.values()]
        torch.stack([part.square().mean() for part in parts]).sum().backward()
    return live.peak_bytes - before


def compute_norms_in_fp32(module: nn.Module) -> None:
    """As autocast does on a GPU; on a CPU it computes norms, and keeps activations, in the lower precision."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


def row(name: str, config: TrainConfig, size: PictureSize, processes: int = 1) -> str:
    """A line of the table."""
    use = memory_use(config, size, processes=processes)
    how = [config.precision, config.optimizer.kind, "checkpointing" if config.gradient_checkpointing else "plain"]
    batch = f"{config.accumulate} x {config.rows_of(size) // (config.accumulate * processes)}"
    parts = [f"{getattr(use, field.name) / GIB:.1f}" for field in fields(use)]
    return f"| {name} | {', '.join(how)} | {size} | {batch} | " + " | ".join(parts) + f" | **{use.total / GIB:.1f}** |"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, action="append", help="files of one configuration, later over earlier")
    parser.add_argument("--size", type=PictureSize.parse, action="append", help="picture sizes (512x512)")
    parser.add_argument("--processes", type=int, default=1, help="processes that share each batch, and the moments")
    parser.add_argument("options", nargs="*", help="after --, options of distill such as --train.batch-size 8")
    arguments = parser.parse_args(argv)
    configurations = [arguments.config] if arguments.config else [[BASE, card] for card in sorted(CARDS.glob("*.yaml"))]
    processes = arguments.processes
    print(f"GiB of a card, SD1.5's size, {'one process' if processes == 1 else f'each of {processes} processes'}\n")
    print(f"| configuration | how | size | batch | {' | '.join(field.name for field in fields(MemoryUse))} | sum |")
    print("|---|---|---|---|" + "---|" * (len(fields(MemoryUse)) + 1))
    for files in configurations:
        config = load(Config, "distill", files, arguments.options).train
        for size in arguments.size or [NATIVE_SIZE]:
            if error := batch_split_error(
                config.batch_size, processes, config.accumulate, config.batch_pixels, [size], config.section
            ):
                parser.error(error)
            print(row(files[-1].stem, config, size, processes), flush=True)


if __name__ == "__main__":
    main()
