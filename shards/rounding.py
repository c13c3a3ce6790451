"""How far a number is from one that was stored in half precision, beyond what the rounding itself explains."""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_EXPONENT, DIGITS = -13, 12
"""As frexp counts: half of a spacing is 2^(exponent - 12), and below 2^-14 spacings do not shrink any more."""


def beyond_rounding(stored: Float[Tensor, "n ..."], now: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """|now - stored|, less half a spacing of half precision there: 0 wherever `now` rounds to what is stored."""
    stored = stored.float()
    return ((now - stored).abs() - _half_spacing(stored)).clamp_min(0)


def error_of(
    stored: Float[Tensor, "n ..."], now: Float[Tensor, "n ..."], size: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The worst of each row, in units of its size.

    The size of an element is that of its row and its own: a conditioning has a few elements that are far larger.
    """
    own = stored.float().abs().flatten(1)
    return (beyond_rounding(stored, now).flatten(1) / (size[:, None] + own)).amax(dim=1)


def rms(values: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Root mean square of each row."""
    return values.float().flatten(1).square().mean(dim=1).sqrt()


def _half_spacing(stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Half the distance from a number in half precision to the next larger one."""
    exponent = torch.frexp(stored).exponent.clamp_min(SMALLEST_EXPONENT)
    exponent = exponent.masked_fill(stored == 0, SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(stored), exponent - DIGITS)
