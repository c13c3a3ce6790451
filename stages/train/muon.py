"""Matrices -> the nearest matrices with singular values near 1, in the precision that the device computes natively.

Muon for the matrices of a network and AdamW for the rest, as one optimizer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the odd quintic a x + b x^3 + c x^5, whose slope at 0 is steep (Jordan et al. 2024)."""
ITERATIONS = 5
MIN_NORM = 1e-7
MAX_ELEMENTS = 1 << 26
"""Of the matrices that are worked on at once: 256 MiB in float32, and as much again for the products."""


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has arithmetic for it, float32 elsewhere: on every CPU, and on GPUs before Ampere.

    A CPU without that arithmetic computes products in bfloat16 ten times slower than in float32, and one that has it
    gains nothing from it with matrices of this size.
    """
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def orthogonalize(
    matrices: Sequence[Float[Tensor, "_ _"]], dtype: torch.dtype | None = None
) -> list[Float[Tensor, "_ _"]]:
    """U S' V^T for each matrix U S V^T, with S' between about 0.7 and 1.2, by Newton and Schulz' iteration.

    Matrices of one shape, or of its transpose, share each product. `dtype` is what the products are computed in; the
    device's native one unless given.
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for batch in _batches(matrices):
        first = matrices[batch[0]]
        stack = torch.stack([_wide(matrices[i]) for i in batch]).to(dtype or native_dtype(first.device))
        for i, result in zip(batch, _newton_schulz(stack), strict=True):
            results[i] = result if _is_wide(matrices[i]) else result.T
    return results


def assign_matrices(matrices: Sequence[Float[Tensor, "_ _"]], process_count: int) -> list[list[int]]:
    """The numbers of the matrices that each of `count` processes computes, so that all take about as long.

    The dearest matrix goes first, to whoever has least to do; the same on every process.
    """
    costs = [min(one.shape) ** 2 * max(one.shape) for one in matrices]
    loads, dealt = [0] * process_count, [list[int]() for _ in range(process_count)]
    for i in sorted(range(len(matrices)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        dealt[least].append(i)
    return [sorted(numbers) for numbers in dealt]


def _newton_schulz(x: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """The iteration X <- a X + (b X X^T + c (X X^T)^2) X on matrices with m <= n, from X / |X|."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(MIN_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of matrices that are computed together: of one shape, and not too many."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(matrices):
        alike.setdefault(_wide(one).shape, []).append(i)
    for (m, n), numbers in alike.items():
        most = max(1, MAX_ELEMENTS // (m * n))
        yield from (numbers[start : start + most] for start in range(0, len(numbers), most))


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T


MOMENTUM = 0.95
UPDATE_RMS = 0.2
"""Root mean square of AdamW's updates (Liu et al. 2025, arXiv:2502.16982, section 2.2)."""


class ProcessGroup(Protocol):
    """The processes that hold the same weights and gradients, and which of them this one is."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Overwrite the tensor by that of process `rank`."""


@dataclass(frozen=True)
class SingleProcess:
    """One process."""

    rank: int = 0
    world: int = 1

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Nobody else is there."""


SINGLE_PROCESS = SingleProcess()
ParameterGrad: TypeAlias = tuple[dict[str, Any], Tensor, Tensor]
"""A group, one of its parameters, and its gradient."""


class Muon(torch.optim.Optimizer):
    """Moves a matrix along its orthogonalised Nesterov momentum (Jordan et al. 2024).

    It moves as far as AdamW would on average (Liu et al. 2025, arXiv:2502.16982), so one learning rate and one decay
    serve both. A convolution is the matrix [out, in x kernel]. Each of several processes orthogonalises its share of
    the matrices and sends it to the others, so all of them end on the same bits. The momentum is whole on each of them:
    a checkpoint holds it, whoever writes it.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__([*map(dict, groups)], {"lr": lr, "weight_decay": weight_decay})
        self._process_group = process_group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("a step is made from gradients that are there")
        moved = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for bucket in _buckets(moved):
            directions = self._orthogonal_directions([self._momentum(parameter, grad) for _, parameter, grad in bucket])
            for (group, parameter, _), direction in zip(bucket, directions, strict=True):
                matrix = as_matrix(parameter)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-group["lr"] * UPDATE_RMS * max(matrix.shape) ** 0.5)

    def _momentum(self, parameter: Tensor, grad: Tensor) -> Float[Tensor, "out n"]:
        """Nesterov's momentum of a parameter after its present gradient."""
        matrix, state = as_matrix(parameter), self.state[parameter]
        gradient = _in_memory_order(parameter, grad).reshape(matrix.shape)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)

    def _orthogonal_directions(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """The orthogonalised momenta, of which this process computes its share."""
        dealt, rank = assign_matrices(momenta, self._process_group.world), self._process_group.rank
        results = dict(zip(dealt[rank], orthogonalize([momenta[i] for i in dealt[rank]]), strict=True))
        for other, numbers in enumerate(dealt if len(dealt) > 1 else ()):
            sizes = [momenta[i].numel() for i in numbers]
            flat = torch.empty(sum(sizes), dtype=native_dtype(momenta[0].device), device=momenta[0].device)
            parts = dict(zip(numbers, flat.split(sizes), strict=True))
            for i, part in parts.items() if other == rank else ():
                part.view(momenta[i].shape).copy_(results[i])
            self._process_group.broadcast(flat, other)
            results |= {i: part.view(momenta[i].shape) for i, part in parts.items()}
        return [results[i] for i in range(len(momenta))]


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind one: their groups, one after the other, and the states of both."""

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        rest: Sequence[dict[str, Any]],
        process_group: ProcessGroup = SINGLE_PROCESS,
        **options: Any,
    ) -> None:
        """Groups of parameters with at least two dimensions, and of any; `options` are AdamW's."""
        super().__init__([*map(dict, matrices), *map(dict, rest)], dict(options))
        common = {name: options[name] for name in ("lr", "weight_decay")}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if matrices:
            self._optimizers["muon"] = Muon(matrices, **common, process_group=process_group)
        if rest:
            self._optimizers["adamw"] = torch.optim.AdamW([*map(dict, rest)], **options)

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that hold the moments."""
        return tuple(self._optimizers.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both, each group at its present learning rate."""
        if closure is not None:
            raise ValueError("a step is made from gradients that are there")
        groups = [group for part in self._optimizers.values() for group in part.param_groups]
        for own, group in zip(self.param_groups, groups, strict=True):
            group["lr"] = own["lr"]
        for part in self._optimizers.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {name: part.state_dict() for name, part in self._optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, or what it gave when torch.optim.Muon was a part of it."""
        for name, part in self._optimizers.items():
            part.load_state_dict(state_dict[name])


def as_matrix(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out n"]:
    """The same memory as [out, in x kernel]; channels_last orders the columns otherwise, and Muon does not mind."""
    return _in_memory_order(weight, weight.detach()).view(len(weight), -1)


def _in_memory_order(weight: Tensor, values: Tensor) -> Tensor:
    """A weight's values or gradient, with its dimensions in the order in which the weight's lie in memory."""
    return values if weight.is_contiguous() else values.movedim(1, -1)


def _buckets(parameter_grads: Sequence[ParameterGrad]) -> Iterator[list[ParameterGrad]]:
    """Parameters that are moved together, those of one shape beside each other; few enough to bound the memory."""
    bucket: list[ParameterGrad] = []
    elements = 0
    for group, parameter, grad in sorted(parameter_grads, key=lambda one: sorted(as_matrix(one[1]).shape)):
        if bucket and elements + parameter.numel() > MAX_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append((group, parameter, grad))
        elements += parameter.numel()
    if bucket:
        yield bucket
