"""Muon for the matrices of a network and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

MOMENTUM = 0.95
AS_FAR_AS_ADAMW = "match_rms_adamw"


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers of torch's behind one: their groups, one after the other, and the states of both.

    Muon moves a matrix along its orthogonalised momentum (Jordan et al. 2024), as far as AdamW would move it on average
    (Liu et al. 2025, arXiv:2502.16982), so one learning rate and one decay serve both. A convolution is the matrix
    [out, in x kernel].
    """

    def __init__(self, matrices: Sequence[dict[str, Any]], rest: Sequence[dict[str, Any]], **options: Any) -> None:
        """Groups of parameters with at least two dimensions, and of any; `options` are AdamW's."""
        super().__init__([*map(dict, matrices), *map(dict, rest)], dict(options))
        flat = [{**group, "params": [as_matrix(p) for p in group["params"]]} for group in matrices]
        own, lent = ([p for group in groups for p in group["params"]] for groups in (matrices, flat))
        self._pairs = list(zip(own, lent, strict=True))
        common = {name: options[name] for name in ("lr", "weight_decay")}
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if matrices:
            self._parts["muon"] = torch.optim.Muon(flat, momentum=MOMENTUM, adjust_lr_fn=AS_FAR_AS_ADAMW, **common)
        if rest:
            self._parts["adamw"] = torch.optim.AdamW([*map(dict, rest)], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both, each group at its present learning rate."""
        if closure is not None:
            raise ValueError("a step is made from gradients that are there")
        groups = [group for part in self._parts.values() for group in part.param_groups]
        for asked, group in zip(self.param_groups, groups, strict=True):
            group["lr"] = asked["lr"]
        for parameter, matrix in self._pairs:
            # Whoever let the parameter wear other numbers for a while may have brought its own back elsewhere.
            matrix.data = as_matrix(parameter)
            matrix.grad = None if parameter.grad is None else _ordered(parameter, parameter.grad).reshape(matrix.shape)
        for part in self._parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])


def as_matrix(weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out n"]:
    """The same memory as [out, in x kernel]; channels_last orders the columns otherwise, and Muon does not mind."""
    return _ordered(weight, weight.detach()).view(len(weight), -1)


def _ordered(weight: Tensor, values: Tensor) -> Tensor:
    """A weight's values or gradient, with its dimensions in the order in which the weight's lie in memory."""
    return values if weight.is_contiguous() else values.movedim(1, -1)
