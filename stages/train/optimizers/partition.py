"""Optimizers whose moments lie on one of several processes each: the first stage of ZeRO, by whole parameters.

torch's ZeroRedundancyOptimizer computes the same bits for AdamW, and was left aside for what it does not do: Muon's
directions are smaller than the weights it would send, `balanced` rates read moments that lie elsewhere, and its
checkpoint sends every part, pickled, to every process. FSDP2 cuts each parameter in rows, and Muon needs matrices.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

MESSAGE_BYTES = 1 << 26
"""Of weights that are sent at once."""
Item = TypeVar("Item")


class ProcessGroup:
    """The processes with the same weights and gradients: here a single one; `Runtime` is several."""

    rank: int = 0
    world: int = 1

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Overwrite the tensor by that of process `rank`."""

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes."""
        return list(tensors)

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in the order of their ranks."""
        return items


SINGLE_PROCESS = ProcessGroup()


class Partition:
    """Which process keeps the moments of a parameter; the same on every process.

    A parameter goes to the process that has the fewest bytes by then, so none has more than the mean and the largest
    parameter (Graham 1966).
    """

    def __init__(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.group = group
        self.loads = [0] * group.world
        """bytes of moments of each process"""
        self._owners: dict[Tensor, int] = {}

    def add(self, parameters: Iterable[Tensor], moments: int) -> None:
        """Give each parameter, which has so many moments of its size, to a process."""
        for parameter in parameters:
            least = self.loads.index(min(self.loads))
            self.loads[least] += moments * parameter.nbytes
            self._owners[parameter] = least

    def __contains__(self, parameter: Tensor) -> bool:
        """Whether a parameter was given to a process."""
        return parameter in self._owners

    def owner(self, parameter: Tensor) -> int:
        """The process that keeps a parameter's moments."""
        return self._owners[parameter]

    def owns(self, parameter: Tensor) -> bool:
        """Whether this process keeps a parameter's moments."""
        return self._owners[parameter] == self.group.rank


class Partitioned(torch.optim.Optimizer):
    """An optimizer with whole groups of parameters, and the state of those that this process owns."""

    partition: Partition

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this process's part of a whole state, copied: what was read may be a file that is mapped."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        own = {i: moments for i, moments in state_dict["state"].items() if self.partition.owns(parameters[i])}
        if self.partition.group.world > 1:
            own = {i: {name: _copied(value) for name, value in moments.items()} for i, moments in own.items()}
        super().load_state_dict({**state_dict, "state": own})

    def gather_state(self) -> dict[str, Any]:
        """The whole state on the main process, where the parts of others lie on the CPU; called by all processes."""
        content, group = self.state_dict(), self.partition.group
        own = content["state"]
        layout = {i: {name: _layout(value) for name, value in moments.items()} for i, moments in own.items()}
        owners = {
            i: (rank, moments) for rank, part in group.gather([(group.rank, layout)]) for i, moments in part.items()
        }
        parameters = [parameter for param_group in self.param_groups for parameter in param_group["params"]]
        for i, (rank, moments) in sorted(owners.items()):
            if rank != 0:
                received = {
                    name: self._send(own.get(i, {}).get(name), form, rank, parameters[i].device)
                    for name, form in moments.items()
                }
                own |= {i: received}
        return {**content, "state": {i: own[i] for i in sorted(owners)}} if group.rank == 0 else {}

    def _send(self, value: Any, form: Any, rank: int, device: torch.device) -> Any:
        """A value of the state of process `rank`, on the main process; elsewhere what was there."""
        if not isinstance(form, _Layout):
            return form
        group = self.partition.group
        flat = torch.empty(form.numel, dtype=form.dtype, device=device)
        if rank == group.rank:
            flat.copy_(in_memory_order(value))
        group.broadcast(flat, rank)
        return flat.cpu().as_strided(form.shape, form.stride) if group.rank == 0 else value


class PartitionedAdamW(Partitioned, torch.optim.AdamW):
    """AdamW of which each process updates the parameters that it owns, and gets the others; same bits as AdamW's."""

    def __init__(self, groups: Sequence[dict[str, Any]], partition: Partition, **options: Any) -> None:
        super().__init__([*map(dict, groups)], **options)
        self.partition = partition
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        partition.add(sorted(self._parameters, key=lambda parameter: -parameter.numel()), moments=2)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; afterwards a parameter of another process has no gradient."""
        if closure is not None:
            raise ValueError("step takes no closure")
        for parameter in self._parameters:
            if not self.partition.owns(parameter):
                parameter.grad = None
        super().step()
        for rank in range(self.partition.group.world):
            for message in _messages([p for p in self._parameters if self.partition.owner(p) == rank]):
                self._broadcast(message, rank)

    def _broadcast(self, parameters: Sequence[Tensor], rank: int) -> None:
        """Overwrite parameters by those of process `rank`."""
        group, values = self.partition.group, [in_memory_order(parameter) for parameter in parameters]
        sizes = [value.numel() for value in values]
        flat = torch.cat(values) if rank == group.rank else values[0].new_empty(sum(sizes))
        group.broadcast(flat, rank)
        if rank != group.rank:
            torch._foreach_copy_(values, list(flat.split(sizes)))


class _Layout:
    """How a tensor lies in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.numel = (
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.numel(),
        )


def in_memory_order(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, " n"]:
    """A view of a dense tensor's numbers in the order of memory, whatever its memory format."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _layout(value: Any) -> Any:
    return _Layout(value) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _messages(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that are sent together: of one type, at most `MESSAGE_BYTES`, or a single one."""
    message: list[Tensor] = []
    for parameter in parameters:
        size = sum(each.nbytes for each in message) + parameter.nbytes
        if message and (size > MESSAGE_BYTES or parameter.dtype != message[0].dtype):
            yield message
            message = []
        message.append(parameter)
    if message:
        yield message
