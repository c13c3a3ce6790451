"""What can be wrong with a picture of a class: it does not show what was said, or it shows what another one does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-6
"""The cosine of a latent with itself may be so much below 1."""


@dataclass(frozen=True)
class Candidates:
    """The pictures that are there; x0 and score of each in the order of the keys."""

    keys: Sequence[str]
    x0: Float[Tensor, "n c h w"]
    score: Float[Tensor, " n"]
    """nan where nothing was said or asked"""


def least(scores: dict[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
    """The lowest of what was said about each picture, nan where nothing was: 1 means that everything said is there."""
    values = torch.stack([value.float().cpu() for value in scores.values()])
    lowest = values.nan_to_num(nan=torch.inf).amin(0)
    return lowest.masked_fill(values.isnan().all(0), torch.nan)


def duplicates(x0: Float[Tensor, "n c h w"], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(later, earlier, cosine) of each picture that shows what an earlier one does which is not such a one itself.

    The cosine of the latents themselves: a latent is a small picture with channels that are near zero on average.
    """
    flat = torch.nn.functional.normalize(x0.float().flatten(1), dim=1)
    cosine, stays = flat @ flat.T, torch.zeros(len(flat), dtype=torch.bool)
    for row in range(len(flat)):
        to_others = cosine[row].masked_fill(~stays, -1)
        nearest = int(to_others.argmax())
        if stays.any() and to_others[nearest] >= threshold - ROUNDING:
            yield row, nearest, min(float(to_others[nearest]), 1.0)
        else:
            stays[row] = True


def low(seen: Candidates, threshold: float | None) -> dict[int, str]:
    """Row -> why, of what scores too low."""
    if threshold is None:
        return {}
    rows = (seen.score < threshold).nonzero().flatten().tolist()
    return {row: f"score {float(seen.score[row]):.3g} is below {threshold:g}" for row in rows}


def alike(seen: Candidates, rows: Sequence[int], threshold: float | None) -> dict[int, str]:
    """Row -> why, of what shows the same as an earlier picture of its class."""
    if threshold is None or not rows:
        return {}
    found = duplicates(seen.x0[list(rows)], threshold)
    return {rows[later]: f"like {seen.keys[rows[earlier]]} ({cosine:.3f})" for later, earlier, cosine in found}
