"""Matrices -> the nearest matrices with singular values near 1, in the precision that the device computes natively."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the odd quintic a x + b x^3 + c x^5, whose slope at 0 is steep (Jordan et al. 2024)."""
ITERATIONS = 5
LEAST_NORM = 1e-7
MOST_ELEMENTS = 1 << 26
"""Of the matrices that are worked on at once: 256 MiB in float32, and as much again for the products."""


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has arithmetic for it, float32 elsewhere: on every CPU, and on GPUs before Ampere.

    A CPU without that arithmetic computes products in bfloat16 ten times slower than in float32, and one that has it
    gains nothing from it with matrices of this size.
    """
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def orthogonalised(
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


def shares(matrices: Sequence[Float[Tensor, "_ _"]], count: int) -> list[list[int]]:
    """The numbers of the matrices that each of `count` processes computes, so that all take about as long.

    The dearest matrix goes first, to whoever has least to do; the same on every process.
    """
    costs = [min(one.shape) ** 2 * max(one.shape) for one in matrices]
    loads, dealt = [0] * count, [list[int]() for _ in range(count)]
    for i in sorted(range(len(matrices)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        dealt[least].append(i)
    return [sorted(numbers) for numbers in dealt]


def _newton_schulz(x: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """The iteration X <- a X + (b X X^T + c (X X^T)^2) X on matrices with m <= n, from X / |X|."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(LEAST_NORM)
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
        most = max(1, MOST_ELEMENTS // (m * n))
        yield from (numbers[start : start + most] for start in range(0, len(numbers), most))


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T
