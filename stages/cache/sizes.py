"""The picture sizes of a cache: which prompt is rendered at which, and how many prompts of each make one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from pydantic import Field, JsonValue

from configs.values import PictureSize, Size, Strict
from stages.nets.latents import LatentGeometry
from stages.prompts import Prompt, derived_seed

SIZES_OPTION = "render.sizes"
SEED_VALUES = 1 << 63
"""Values of a derived seed."""
SUM_TOLERANCE = Fraction(1, 10**9)


class SizeShare(Strict):
    """A picture size, and the share of the prompts that are rendered at it."""

    size: Size = Field(description="width x height in pixels")
    share: float = Field(gt=0, description="relative to the sum of all shares")


def refuse_repeated_sizes(sizes: Sequence[SizeShare]) -> Sequence[SizeShare]:
    """The sizes; raises `ValueError` naming one that is listed twice."""
    listed = [one.size for one in sizes]
    for size in listed:
        if listed.count(size) > 1:
            raise ValueError(f"{size} is listed {listed.count(size)} times - list each size once")
    return sizes


def normalized_shares(sizes: Sequence[SizeShare]) -> list[Fraction]:
    """The shares as written in decimals, divided by their sum: 4, 3, 3 and .4, .3, .3 are the same.

    Shares that sum to 1 up to rounding, such as those of a recipe, stay as they are.
    """
    shares = [Fraction(str(one.share)) for one in sizes]
    total = sum(shares, Fraction())
    return shares if abs(total - 1) < SUM_TOLERANCE else [share / total for share in shares]


def size_of(prompt_seed: int, sizes: Sequence[SizeShare]) -> PictureSize:
    """The size of the prompt with this seed: it depends on nothing else, so more prompts never change it."""
    uniform = Fraction(derived_seed("size", prompt_seed), SEED_VALUES)
    upper_bounds = list(accumulate(normalized_shares(sizes)))
    return sizes[sum(bound <= uniform for bound in upper_bounds[:-1])].size


@dataclass(frozen=True)
class RenderSizes:
    """The sizes at which a teacher renders the prompts of a cache; without any, all at its native size."""

    native: PictureSize
    sizes: tuple[SizeShare, ...] = ()

    @classmethod
    def checked(cls, sizes: Sequence[SizeShare], latents: LatentGeometry) -> "RenderSizes":
        """The sizes of a teacher with these latents; raises `Refused` naming one that it has not.

        A list of its native size alone is the same as none.
        """
        for one in sizes:
            latents.check_size(one.size, SIZES_OPTION)
        others = any(one.size != latents.native_size for one in sizes)
        return cls(latents.native_size, tuple(sizes) if others else ())

    @property
    def listed(self) -> tuple[PictureSize, ...]:
        """Every size, in the order in which it was written."""
        return tuple(one.size for one in self.sizes) or (self.native,)

    @property
    def by_frequency(self) -> tuple[PictureSize, ...]:
        """Every size, the most frequent first."""
        return tuple(one.size for one in sorted(self.sizes, key=lambda one: -one.share)) or (self.native,)

    def size_of(self, prompt: Prompt) -> PictureSize:
        """The size at which a prompt is rendered."""
        return size_of(prompt.seed, self.sizes) if self.sizes else self.native

    def batch_prompts(self, batch_size: int, size: PictureSize) -> int:
        """Prompts in a batch of this size, where `batch_size` is that of the native size: as many pixels, or one."""
        return max(1, batch_size * self.native.pixels // size.pixels)

    def identity(self) -> list[JsonValue]:
        """The sizes as a recipe holds them, the shares summing to 1."""
        shares = zip(self.sizes, normalized_shares(self.sizes), strict=True)
        return [{"size": str(one.size), "share": float(share)} for one, share in shares]
