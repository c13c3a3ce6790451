"""Which checkpoints stay: the last few, one of every so many samples, and the best."""

from collections.abc import Mapping
from itertools import groupby

from pydantic import Field

from configs.strict import Strict


class KeepConfig(Strict):
    """Which checkpoints stay; the best one always does, once a run has measured its error at checkpoints."""

    last: int = Field(2, ge=1, description="newest checkpoints that stay")
    every_samples: int | None = Field(
        None, ge=1, description="the first checkpoint at or after each multiple of so many samples stays for good"
    )


def staying(scores: Mapping[int, float | None], keep: KeepConfig) -> set[int]:
    """Those of the whole checkpoints on the disk that stay, each by its samples; `scores` holds their errors.

    The lowest score is the best, the earlier one of two equals; None was not measured. Deciding after every save
    leaves what deciding once at the end would, because whoever leaves once would never stay later.
    """
    ordered = sorted(scores)
    stay = set(ordered[-keep.last :])
    if keep.every_samples is not None:
        turns = groupby(ordered, key=lambda samples: samples // keep.every_samples)  # type: ignore[operator]
        stay |= {next(found) for multiple, found in turns if multiple > 0}
    measured = [(score, samples) for samples, score in scores.items() if score is not None]
    return stay | {samples for _score, samples in sorted(measured)[:1]}
