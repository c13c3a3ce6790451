"""Fidelity: the share of pictures that show what their prompts name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from configs.values import PictureSize
from stages.system.refusal import Refused


class Scorer(Protocol):
    """Texts and pictures [b 3 H W] in [0, 1] -> attribute -> [b]: 1 shown, 0 not shown, nan where not named."""

    def __call__(self, texts: Sequence[str], pictures: Tensor) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Fidelity:
    """Share of pictures that show each attribute, of those whose prompt names it, and that show every named one."""

    by_attribute: Mapping[str, float]
    all_at_once: float
    pictures: int


def shows_everything(scores: Mapping[str, Float[Tensor, " b"]]) -> Bool[Tensor, " b"]:
    """Whether each picture shows every attribute that its text names."""
    return ~torch.stack([value < 1 for value in scores.values()]).any(0)  # nan < 1 is false


def refuse_blind_scorer(scorer: Scorer, text: str, size: PictureSize, hint: str) -> None:
    """Raise `Refused` where the scorer judges no picture of this size; `text` is a sentence that it knows."""
    scores = scorer([text], torch.zeros(1, 3, size.height, size.width))
    if all(bool(value.isnan().all()) for value in scores.values()):
        raise Refused(f"scorer: it judges no picture of {size} - {hint}")


def compute_fidelity(scorer: Scorer, texts: Sequence[str], pictures: Float[Tensor, "b 3 H W"]) -> Fidelity:
    """The scorer's shares for pictures of these texts."""
    return fidelity_of(scorer(texts, pictures))


def fidelity_of(scores: Mapping[str, Tensor]) -> Fidelity:
    """The shares of what a scorer returned."""
    scores = {name: value.float() for name, value in scores.items()}
    shares = {name: float(value.nanmean()) for name, value in scores.items()}
    return Fidelity(shares, float(shows_everything(scores).float().mean()), len(next(iter(scores.values()))))
