"""Which samples of a cache a run uses."""

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Bool
from pydantic import Field, model_validator

from configs.values import Size, Strict
from shards.record import RecordHeader


class View(Strict):
    """Which samples of a cache are used; a sample must pass all of these."""

    classes: str = Field("*", description="glob over class names, such as star/* or */red")
    s_range: tuple[float, float] = Field(
        (0.0, 1.0), description="path times s, from the first number to below the second; an end of 1 is included"
    )
    guidance_range: tuple[float, float] | None = Field(
        None, description="guidance scales of the generated pictures, both ends included; none takes all"
    )
    prompt_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the prompts; a smaller share lies inside every larger one"
    )
    size: Size | None = Field(None, description="pictures of this size alone, such as 512x768; none takes all sizes")

    @model_validator(mode="after")
    def _check_ranges(self) -> "View":
        for name in ("s_range", "guidance_range"):
            span = getattr(self, name)
            if span and not span[0] <= span[1]:
                raise ValueError(f"{name} {span[0]} {span[1]} should rise")
        return self

    def needs_headers(self) -> bool:
        """Whether records must be looked into; of which size they are, their shards tell."""
        return self.model_copy(update={"size": None}) != View()

    def includes(self, record: RecordHeader) -> bool:
        """Whether any state of this record may be used."""
        lowest, highest = self.guidance_range or (-np.inf, np.inf)
        return (
            fnmatchcase(record.class_name, self.classes)
            and lowest <= record.guidance_scale <= highest
            and uniform_of_key(record.key) < self.prompt_fraction
        )

    def mask(self, records: Iterable[RecordHeader]) -> Bool[np.ndarray, " n"]:
        """For each state of each record, whether it is used."""
        first, last = self.s_range
        masks = []
        for record in records:
            s = np.array(record.s, dtype=np.float32)
            in_range = (first <= s) & ((s < last) | ((s == 1) & (last == 1)))
            masks.append(in_range & self.includes(record))
        return np.concatenate(masks)


def uniform_of_key(key: str) -> float:
    """A number in [0, 1) that depends on the key alone: a prompt is in every fraction above it."""
    return int.from_bytes(hashlib.sha256(f"prompt {key}".encode()).digest()[:6], "big") / 2**48
