"""The settings of the training for few steps, and the lists of windows that it takes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from configs.values import Strict
from stages.hub.uploader import HubConfig
from stages.train.setup import TrainConfig

POSSIBLE_WINDOWS = (8, 4, 2, 1)
"""Numbers of windows whose ends a cache can hold (`render.states.windows`), or that divide such a number."""


class FastTrainConfig(TrainConfig):
    """How long, how fast and how often."""

    section: ClassVar[str] = "fast.train"


class FastConfig(Strict):
    """The second phase: students of few steps, whose one branch takes the guidance scale (mathematics.md section 7)."""

    start: Path | None = Field(
        None, description="finished run folder that the first number of windows starts from; none: RUN/distill"
    )
    train: FastTrainConfig = Field(
        FastTrainConfig(), description="how long, how fast, how often, for each number of windows"
    )
    landing_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the rows on a trajectory that begin at a window instead of at their own state; rows of "
        "renoised states do but for identity_share",
    )
    identity_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the rows of renoised states that keep their own state and learn by the identity "
        "u = v - (s - b) du/ds (MeanFlow) instead of a landing; a cache without landings takes 1 alone",
    )
    validation_states: int = Field(160, ge=0, description="held-out states measured at each checkpoint; 0 for none")
    hub: HubConfig = Field(HubConfig(), description="where the run of one number of windows is uploaded to")


def windows_error(windows: Sequence[int]) -> str | None:
    """Why a list of windows cannot be trained one after the other; None where it can."""
    if wrong := [number for number in windows if number not in POSSIBLE_WINDOWS]:
        return f"windows {wrong[0]} should be one of {' '.join(map(str, POSSIBLE_WINDOWS))}, numbers of steps"
    for before, after in pairwise(windows):
        if after >= before or before % after:
            return (
                f"windows {' '.join(map(str, windows))}: {after} does not follow {before}, because each student starts "
                "from the one before - let the numbers fall by divisors, such as 4 2 1"
            )
    return None
