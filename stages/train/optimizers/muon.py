"""Muon for the matrices of a network and AdamW for the rest, as one optimizer.

Products are computed in the precision that is native to the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from stages.train.optimizers.partition import SINGLE_PROCESS, Partition, Partitioned, PartitionedAdamW, ProcessGroup

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the odd quintic a x + b x^3 + c x^5, whose slope at 0 is steep (Jordan et al. 2024)."""
ITERATIONS = 5
MIN_NORM = 1e-7
MAX_ELEMENTS = 1 << 26
"""Of the matrices computed at once: 256 MiB in float32, and as much again for the products."""
MOMENTUM = 0.95
UPDATE_RMS = 0.2
"""Root mean square of AdamW's updates (Liu et al. 2025, arXiv:2502.16982, section 2.2)."""
ParameterGrad: TypeAlias = tuple[dict[str, Any], Tensor, Tensor]
"""A group, one of its parameters, and its gradient."""


class Muon(Partitioned):
    """Moves a matrix along its orthogonalised Nesterov momentum (Jordan et al. 2024).

    Its updates have the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982), so one learning rate and one
    decay serve both. A convolution is the matrix [out, in x kernel]. Each of several processes keeps the momentum of
    its part of the matrices, orthogonalises it and broadcasts that, so all of them get the same bits.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        partition: Partition | None = None,
    ) -> None:
        super().__init__([*map(dict, groups)], {"lr": lr, "weight_decay": weight_decay})
        self.partition = partition or Partition()
        # In the order of the work, so that the processes share what is computed together.
        whole = [(group, parameter, parameter) for group in self.param_groups for parameter in group["params"]]
        for bucket in reversed(list(_buckets(whole))):
            self.partition.add((parameter for _, parameter, _ in reversed(bucket)), moments=1)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("step takes no closure")
        updated = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for bucket in _buckets(updated):
            directions = self._orthogonal_directions(bucket)
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

    def _orthogonal_directions(self, bucket: Sequence[ParameterGrad]) -> list[Float[Tensor, "out n"]]:
        """The orthogonalised momenta, of which this process computes those it owns."""
        group = self.partition.group
        owners = [self.partition.owner(parameter) for _, parameter, _ in bucket]
        own = {i: self._momentum(*bucket[i][1:]) for i, owner in enumerate(owners) if owner == group.rank}
        results = dict(zip(own, orthogonalize(list(own.values())), strict=True))
        for rank in sorted(set(owners)) if group.world > 1 else ():
            indices = [i for i, owner in enumerate(owners) if owner == rank]
            shapes = [as_matrix(bucket[i][1]).shape for i in indices]
            device = bucket[0][1].device
            flat = torch.empty(sum(map(math.prod, shapes)), dtype=native_dtype(device), device=device)
            pieces = zip(shapes, flat.split([*map(math.prod, shapes)]), strict=True)
            parts = {i: part.view(shape) for i, (shape, part) in zip(indices, pieces, strict=True)}
            for i, part in parts.items() if rank == group.rank else ():
                part.copy_(results[i])
            group.broadcast(flat, rank)
            results |= parts
        return [results[i] for i in range(len(bucket))]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW with one interface: first the groups of `matrices`, then those of `rest`."""

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        rest: Sequence[dict[str, Any]],
        process_group: ProcessGroup = SINGLE_PROCESS,
        shard_rest: bool = False,
        **options: Any,
    ) -> None:
        """Groups of parameters with at least two dimensions, and with any number; `options` are AdamW's.

        With `shard_rest` the processes share AdamW's moments as they share Muon's.
        """
        super().__init__([*map(dict, matrices), *map(dict, rest)], dict(options))
        common = {name: options[name] for name in ("lr", "weight_decay")}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        partition = Partition(process_group)
        if matrices:
            self.optimizers["muon"] = Muon(matrices, **common, partition=partition)
        if rest and shard_rest:
            self.optimizers["adamw"] = PartitionedAdamW(rest, partition, **options)
        elif rest:
            self.optimizers["adamw"] = torch.optim.AdamW([*map(dict, rest)], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both, each group at its present learning rate."""
        if closure is not None:
            raise ValueError("step takes no closure")
        groups = [group for part in self.optimizers.values() for group in part.param_groups]
        for own, group in zip(self.param_groups, groups, strict=True):
            group["lr"] = own["lr"]
        for part in self.optimizers.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the state of torch.optim.Muon is accepted too."""
        for name, part in self.optimizers.items():
            part.load_state_dict(state_dict[name])


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs from Ampere on; float32 elsewhere, because CPUs are no faster in bfloat16 at these sizes."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def orthogonalize(
    matrices: Sequence[Float[Tensor, "_ _"]], dtype: torch.dtype | None = None
) -> list[Float[Tensor, "_ _"]]:
    """U S' V^T for each matrix U S V^T, with S' between about 0.7 and 1.2, by Newton and Schulz' iteration.

    Matrices of one shape, or of its transpose, share each product. `dtype` is that of the products; None is native.
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for batch in _batches(matrices):
        first = matrices[batch[0]]
        stack = torch.stack([_wide(matrices[i]) for i in batch]).to(dtype or native_dtype(first.device))
        for i, result in zip(batch, _newton_schulz(stack), strict=True):
            results[i] = result if _is_wide(matrices[i]) else result.T
    return results


def _newton_schulz(x: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """The iteration X <- a X + (b X X^T + c (X X^T)^2) X on matrices with m <= n, from X / |X|."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(MIN_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices of matrices that are computed together: of one shape, at most `MAX_ELEMENTS` elements."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(_wide(matrix).shape, []).append(i)
    for (m, n), indices in by_shape.items():
        size = max(1, MAX_ELEMENTS // (m * n))
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T


def as_matrix(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out n"]:
    """A view as [out, in x kernel]; channels_last permutes the columns, to which Muon is invariant."""
    return _in_memory_order(weight, weight.detach()).view(len(weight), -1)


def relaid(
    momentum: Float[Tensor, "..."], weight: Float[Tensor, "out ..."], was_channels_last: bool
) -> Float[Tensor, "..."]:
    """A momentum of a weight that was channels_last or not, with the columns in the order of the weight's memory."""
    if weight.ndim != 4 or was_channels_last != weight.is_contiguous():
        return momentum
    out, n_in, height, width = weight.shape
    if was_channels_last:
        values = momentum.view(out, height, width, n_in).movedim(-1, 1)
    else:
        values = momentum.view(weight.shape)
    return _in_memory_order(weight, values).reshape(momentum.shape)


def _in_memory_order(weight: Tensor, values: Tensor) -> Tensor:
    """A weight's values or gradient, with the dimensions in the order of the weight's memory."""
    return values if weight.is_contiguous() else values.movedim(1, -1)


def _buckets(parameter_grads: Sequence[ParameterGrad]) -> Iterator[list[ParameterGrad]]:
    """Parameters that are updated together, sorted by shape; at most `MAX_ELEMENTS` elements, to bound the memory."""
    bucket: list[ParameterGrad] = []
    elements = 0
    for group, parameter, grad in sorted(parameter_grads, key=lambda entry: sorted(as_matrix(entry[1]).shape)):
        if bucket and elements + parameter.numel() > MAX_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append((group, parameter, grad))
        elements += parameter.numel()
    if bucket:
        yield bucket
