"""The arithmetic of a mix, tensor by tensor: base + sum of weight * (fine-tune - base), and how far a fine-tune is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from stages.system.refusal import Refused
from stages.teacher_files.checkpoint.stored import LazyTensor

LARGEST_WEIGHT = 65504.0
"""Of half precision, in which models are used; weights of models are below 100."""
FAR_DISTANCE = 1.0
"""From this distance on a model is too far from its base for their difference to mean anything."""
Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class MixedTensor:
    """A weight of a mix, computed when it is needed."""

    base: LazyTensor
    terms: Sequence[tuple[float, LazyTensor]]
    """Weight and tensor of each fine-tune, in an order that is fixed whatever the user's is."""

    @property
    def dtype(self) -> torch.dtype:
        """fp32: a sum of half precision would lose most of a small difference."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base's."""
        return self.base.shape

    @property
    def file(self) -> Path:
        """The file of the base's."""
        return self.base.file

    def read(self) -> Tensor:
        """base + sum of w (m - base) as (1 - sum of w) base + sum of w m, rounded once: one m of weight 1 is m."""
        total = self.base.read().double() * (1 - math.fsum(weight for weight, _ in self.terms))
        for weight, tensor in self.terms:
            total += tensor.read().double().mul_(weight)
        return total.float()


class Comparison:
    """One part of several fine-tunes beside the base's: which are the same, and how far each is."""

    def __init__(self, count: int) -> None:
        self.equals_base = [True] * count
        """Whether each has the values of the base exactly."""
        self.same: set[tuple[int, int]] = set(combinations(range(-1, count), 2))
        """Pairs of one model, perhaps stored in two precisions; -1 is the base."""
        self._distances = [0.0] * count
        self._values = 0

    def add(self, base: Tensor, others: Sequence[Tensor]) -> None:
        """Compare one tensor."""
        held = (*others, base)  # so that -1 is the base
        self.same = {(one, other) for one, other in self.same if _same_values(held[one], held[other])}
        is_kernel = base.ndim >= 2
        self._values += base.numel() * is_kernel
        for number, other in enumerate(others):
            if (one := base.double()).equal(two := other.double()):
                continue
            self.equals_base[number] = False
            if is_kernel:
                norms = float(one.square().sum() + two.square().sum())
                self._distances[number] += base.numel() * 2 * float((two - one).square().sum()) / norms

    def distance(self, number: int) -> float:
        """The root mean square, over all matrices and kernels, of sqrt(2) |b - a| / sqrt(|a|^2 + |b|^2).

        About |b - a| / |a| where that is small, and sqrt(2) for unrelated weights, which are orthogonal. Each tensor
        counts by its number of values. Vectors are left out: the gains of norms are near 1 in every model.
        """
        return math.sqrt(self._distances[number] / self._values) if self._values else 0.0


def compare(base: Tensors, others: Sequence[tuple[str, float, Tensors]]) -> Comparison:
    """Read every tensor of one part once, so that nothing is left to refuse later.

    `others` are subject of messages, weight and tensors of each fine-tune. Raises `Refused` for a value that is not
    finite, and for weights whose sum may be too large for any model.
    """
    comparison = Comparison(len(others))
    rest = abs(1 - math.fsum(weight for _, weight, _ in others))
    for name, tensor in base.items():
        own = tensor.read()
        bound = rest * _largest(own, name, f"teacher: {tensor.file}")
        values = [tensors[name].read() for _, _, tensors in others]
        for (subject, weight, _), value in zip(others, values, strict=True):
            bound += abs(weight) * _largest(value, name, subject)
        if not bound <= LARGEST_WEIGHT:
            weights = ", ".join(f"{weight:g}" for _, weight, _ in others)
            raise Refused(
                f"mix: weights {weights}: values of {name} may become {bound:.3g}, which no model computes with - take "
                "weights nearer to 1"
            )
        comparison.add(own, values)
    return comparison


def _largest(value: Tensor, name: str, subject: str) -> float:
    largest = float(value.float().abs().max()) if value.numel() else 0.0
    if not math.isfinite(largest):
        raise Refused(f"{subject}: tensor {name} is not finite - fetch the file again")
    if largest > LARGEST_WEIGHT:
        raise Refused(f"{subject}: tensor {name} holds {largest:.3g}, which no model computes with - fetch it again")
    return largest


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in the type of the one that is stored more coarsely."""
    dtype = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(one.to(dtype).float(), other.to(dtype).float())
