"""Muon for the matrices of a network and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from stages.train.orthogonal import MOST_ELEMENTS, native_dtype, orthogonalised, shares

MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of AdamW's updates (Liu et al. 2025, arXiv:2502.16982, section 2.2)."""


class Processes(Protocol):
    """The processes that hold the same weights and gradients, and which of them this one is."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Overwrite the tensor by that of process `rank`."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    world: int = 1

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Nobody else is there."""


ALONE = Alone()
Moved: TypeAlias = tuple[dict[str, Any], Tensor, Tensor]
"""A group, one of its parameters, and its gradient."""


class Muon(torch.optim.Optimizer):
    """Moves a matrix along its orthogonalised Nesterov momentum (Jordan et al. 2024).

    It moves as far as AdamW would on average (Liu et al. 2025, arXiv:2502.16982), so one learning rate and one decay
    serve both. A convolution is the matrix [out, in x kernel]. Each of several processes orthogonalises its share of
    the matrices and sends it to the others, so all of them end on the same bits. The momentum is whole on each of them:
    a checkpoint holds it, whoever writes it.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float, processes: Processes = ALONE
    ) -> None:
        super().__init__([*map(dict, groups)], {"lr": lr, "weight_decay": weight_decay})
        self._processes = processes

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("a step is made from gradients that are there")
        moved = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for bucket in _buckets(moved):
            directions = self._directions([self._momentum(parameter, grad) for _, parameter, grad in bucket])
            for (group, parameter, _), direction in zip(bucket, directions, strict=True):
                matrix = as_matrix(parameter)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-group["lr"] * RMS * max(matrix.shape) ** 0.5)

    def _momentum(self, parameter: Tensor, grad: Tensor) -> Float[Tensor, "out n"]:
        """Nesterov's momentum of a parameter after its present gradient."""
        matrix, state = as_matrix(parameter), self.state[parameter]
        gradient = _ordered(parameter, grad).reshape(matrix.shape)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)

    def _directions(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """The orthogonalised momenta, of which this process computes its share."""
        dealt, rank = shares(momenta, self._processes.world), self._processes.rank
        results = dict(zip(dealt[rank], orthogonalised([momenta[i] for i in dealt[rank]]), strict=True))
        for other, numbers in enumerate(dealt if len(dealt) > 1 else ()):
            sizes = [momenta[i].numel() for i in numbers]
            flat = torch.empty(sum(sizes), dtype=native_dtype(momenta[0].device), device=momenta[0].device)
            parts = dict(zip(numbers, flat.split(sizes), strict=True))
            for i, part in parts.items() if other == rank else ():
                part.view(momenta[i].shape).copy_(results[i])
            self._processes.broadcast(flat, other)
            results |= {i: part.view(momenta[i].shape) for i, part in parts.items()}
        return [results[i] for i in range(len(momenta))]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one: their groups, one after the other, and the states of both."""

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        rest: Sequence[dict[str, Any]],
        processes: Processes = ALONE,
        **options: Any,
    ) -> None:
        """Groups of parameters with at least two dimensions, and of any; `options` are AdamW's."""
        super().__init__([*map(dict, matrices), *map(dict, rest)], dict(options))
        common = {name: options[name] for name in ("lr", "weight_decay")}
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if matrices:
            self._parts["muon"] = Muon(matrices, **common, processes=processes)
        if rest:
            self._parts["adamw"] = torch.optim.AdamW([*map(dict, rest)], **options)

    @property
    def parts(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that hold the moments."""
        return tuple(self._parts.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both, each group at its present learning rate."""
        if closure is not None:
            raise ValueError("a step is made from gradients that are there")
        groups = [group for part in self._parts.values() for group in part.param_groups]
        for own, group in zip(self.param_groups, groups, strict=True):
            group["lr"] = own["lr"]
        for part in self._parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, or what it gave when torch.optim.Muon was a part of it."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])


def as_matrix(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out n"]:
    """The same memory as [out, in x kernel]; channels_last orders the columns otherwise, and Muon does not mind."""
    return _ordered(weight, weight.detach()).view(len(weight), -1)


def _ordered(weight: Tensor, values: Tensor) -> Tensor:
    """A weight's values or gradient, with its dimensions in the order in which the weight's lie in memory."""
    return values if weight.is_contiguous() else values.movedim(1, -1)


def _buckets(moved: Sequence[Moved]) -> Iterator[list[Moved]]:
    """Parameters that are moved together, those of one shape beside each other; few enough to bound the memory."""
    bucket: list[Moved] = []
    elements = 0
    for group, parameter, grad in sorted(moved, key=lambda one: sorted(as_matrix(one[1]).shape)):
        if bucket and elements + parameter.numel() > MOST_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append((group, parameter, grad))
        elements += parameter.numel()
    if bucket:
        yield bucket
