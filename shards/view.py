"""A part of a split, chosen by its reader: the shards stay as they are."""

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Bool
from pydantic import Field, model_validator

from configs.strict import Strict
from shards.layout import Head

Range = tuple[float, float]


class View(Strict):
    """Which samples of a cache are used; a sample must pass all of these."""

    classes: str = Field("*", description="glob over class names, such as star/* or */red")
    s_range: Range = Field(
        (0.0, 1.0), description="path times s, from the first number to below the second; an end of 1 counts too"
    )
    guidance_range: Range | None = Field(
        None, description="guidance scales that the pictures were painted with, both ends included; none takes all"
    )
    prompt_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the prompts; a smaller share lies inside every larger one"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "View":
        for name in ("s_range", "guidance_range"):
            span = getattr(self, name)
            if span and not span[0] <= span[1]:
                raise ValueError(f"{name} {span[0]} {span[1]} should rise")
        return self

    def takes_all(self) -> bool:
        """Whether nothing is left out, so that no record need be looked at."""
        return self == View()

    def takes(self, record: Head) -> bool:
        """Whether any draw of this record may be used."""
        lowest, highest = self.guidance_range or (-np.inf, np.inf)
        return (
            fnmatchcase(record.class_name, self.classes)
            and lowest <= record.guidance_scale <= highest
            and chance(record.key) < self.prompt_fraction
        )

    def wanted(self, records: Iterable[Head]) -> Bool[np.ndarray, " n"]:
        """For each draw of each record, whether it is used."""
        first, last = self.s_range
        found = []
        for record in records:
            s = np.array(record.s, dtype=np.float32)
            in_range = (first <= s) & ((s < last) | ((s == 1) & (last == 1)))
            found.append(in_range & self.takes(record))
        return np.concatenate(found)


def chance(key: str) -> float:
    """A number in [0, 1) that belongs to a prompt for ever: it decides which fractions the prompt is in."""
    return int.from_bytes(hashlib.sha256(f"prompt {key}".encode()).digest()[:6], "big") / 2**48
