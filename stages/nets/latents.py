"""Picture sizes of a model: the latents of each, the unit of which sizes are multiples, and the nearest valid ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from configs.values import PictureSize
from stages.system.refusal import Refused

MAX_UNIT_PIXELS, NATIVE_UNITS = 64, 8
"""Sizes are multiples of an eighth of the native side, of 64 pixels at most: 64 for SD1.x."""
MAX_NATIVE_SIDES = 4
"""Longest side of a picture, in native sides; the self-attention of a larger one outgrows every card."""
NEAREST_COUNT = 2


def aspect_distance(one: PictureSize, other: PictureSize) -> float:
    """How far the aspects of two sizes are apart: |ln| of their ratio, 0 for the same."""
    return abs(math.log(one.width * other.height / (one.height * other.width)))


@dataclass(frozen=True)
class LatentGeometry:
    """Channels and side of a model's own latents, and the pixels of a picture for each of their values."""

    channels: int
    native_side: int
    """Of its square latents."""
    factor: int
    """Pixels of a side for one value of a latent's side."""

    @classmethod
    def from_configs(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> "LatentGeometry":
        """The geometry that the configs of a model's UNet and autoencoder state."""
        return cls(unet["in_channels"], unet["sample_size"], 1 << (len(vae["block_out_channels"]) - 1))

    @property
    def native_size(self) -> PictureSize:
        """The size of the pictures that the model was made for, a square."""
        return PictureSize(self.native_side * self.factor, self.native_side * self.factor)

    @property
    def unit(self) -> int:
        """Pixels of which both sides of a valid size are multiples; the native side is one."""
        most = max(1, min(MAX_UNIT_PIXELS // self.factor, self.native_side // NATIVE_UNITS))
        return self.factor * next(side for side in range(most, 0, -1) if self.native_side % side == 0)

    def latent_shape(self, size: PictureSize | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a valid size; of the native one by default."""
        size = size or self.native_size
        return self.channels, size.height // self.factor, size.width // self.factor

    def size_of_latents(self, height: int, width: int) -> PictureSize:
        """The size of the picture of latents [c, height, width]."""
        return PictureSize(width * self.factor, height * self.factor)

    def is_valid(self, size: PictureSize) -> bool:
        """Whether the model can be asked for pictures of this size."""
        return all(side % self.unit == 0 and 0 < side <= self._longest_side for side in (size.width, size.height))

    def check_size(self, size: PictureSize, option: str) -> PictureSize:
        """The size; raises `Refused` naming the option and the nearest valid sizes where it is none."""
        if self.is_valid(size):
            return size
        too_long = max(size.width, size.height) > self._longest_side
        reason = (
            f"this model has sides of up to {self._longest_side} pixels"
            if too_long
            else f"sides of this model are multiples of {self.unit} pixels"
        )
        near = " or ".join(map(str, self.nearest_sizes(size)))
        raise Refused(f"{option}: {size}: {reason} - take {near}")

    def nearest_sizes(self, size: PictureSize) -> list[PictureSize]:
        """The valid sizes nearest to one, by the sum of the differences of both sides, then by aspect."""
        near = {PictureSize(*sides) for sides in product(self._near_sides(size.width), self._near_sides(size.height))}

        def distance(one: PictureSize) -> tuple[int, float, PictureSize]:
            pixels = abs(one.width - size.width) + abs(one.height - size.height)
            return pixels, aspect_distance(one, size), one

        return sorted(near, key=distance)[:NEAREST_COUNT]

    def _near_sides(self, side: int) -> set[int]:
        """The valid sides on both sides of a number of pixels."""
        below = side // self.unit * self.unit
        rounded = {below} if below == side else {below, below + self.unit}
        return {min(max(one, self.unit), self._longest_side) for one in rounded}

    @property
    def _longest_side(self) -> int:
        return MAX_NATIVE_SIDES * self.native_side * self.factor
