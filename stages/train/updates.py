"""How far one step moves the weights of each block, from a sample of them: any optimizer, next to no time."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.train.optim import block_of

MOST_PER_PARAMETER = 4096


class UpdateRatios:
    """|dw| / |w| by block, between two moments.

    Of each parameter about `MOST_PER_PARAMETER` weights, evenly spaced, are looked at, and counted for the others: no
    copy of all weights is held, and no state of the optimizer is asked for.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._before: dict[str, Tensor] = {}

    def remember(self) -> None:
        """The first moment: just before a step."""
        self._before = {name: _sampled(parameter).clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """The ratios since then, which is forgotten; nothing where no moment was remembered."""
        if not self._before:
            return {}
        then = list(self._before.values())
        moved = torch._foreach_sub([_sampled(self._parameters[name]) for name in self._before], then)
        norms = torch.stack([torch.stack(torch._foreach_norm(few)) for few in (moved, then)])
        squares = norms.double().square().cpu()
        blocks: dict[str, Tensor] = {}
        for column, (name, few) in enumerate(self._before.items()):
            counted = squares[:, column] * (self._parameters[name].numel() / few.numel())
            blocks[block_of(name)] = blocks.get(block_of(name), 0.0) + counted
        self._before = {}
        return {block: float((moved / whole).sqrt()) for block, (moved, whole) in sorted(blocks.items())}


def _sampled(parameter: nn.Parameter) -> Tensor:
    """Evenly spaced weights in the order of memory, whatever the memory format."""
    stride = -(-parameter.numel() // MOST_PER_PARAMETER)
    while math.gcd(stride, parameter.numel()) > 1 and stride > 1:
        stride += 1  # a stride that divides a dimension would meet the same place of every kernel
    few = -(-parameter.numel() // stride)
    return parameter.detach().as_strided((few,), (stride,), parameter.storage_offset())
