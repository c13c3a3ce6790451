"""When training on classes ends before its last sample, and which of its checkpoints is the best.

Both are functions of what the journal tells of the checkpoints so far, so a run that goes on decides as one that was
never left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from configs.refusal import Refused
from configs.strict import Strict

POINTS = 100.0


class StopConfig(Strict):
    """End when the classes gain no more, or the rest loses, and take the best checkpoint.

    A small exam is noisy: of 16 pictures one is 6 points, and a share of .95 has a standard error of 5. So this is off
    unless asked for, and better asked for with a larger `exam.checkpoint_pictures`.
    """

    patience: int = Field(
        3, ge=1, description="checkpoints in a row without a better score, weighted by class, after which training ends"
    )
    most_lost: float | None = Field(
        20.0,
        gt=0,
        description="points (percent of right pictures) that no class, and not what lies outside of all, may lose "
        "against the distilled student; needs a scorer; none looks at the classes' score alone",
    )


@dataclass(frozen=True)
class Marked:
    """What one checkpoint was worth."""

    samples: int
    score: float
    """the lower the better"""
    lost: Mapping[str, float]
    """points lost against the start, of each class and of the rest; empty where nobody counts right pictures"""

    @classmethod
    def read(cls, note: Mapping[str, Any]) -> "Marked":
        """What a line of the journal says."""
        return cls(note["samples"], note["wrong"], note.get("lost", {}))

    def loser(self, config: StopConfig) -> str | None:
        """What lost more than it may, if anything did."""
        worst = max(self.lost, key=lambda name: self.lost[name], default=None)
        most = config.most_lost
        return worst if worst is not None and most is not None and self.lost[worst] > most else None


def best(marks: Sequence[Marked], config: StopConfig) -> Marked:
    """The checkpoint with the lowest score of those that lose nothing; the earlier of two equal ones.

    Raises `Refused` when there is none.
    """
    allowed = [mark for mark in marks if mark.loser(config) is None]
    if not allowed:
        told = "; ".join(f"after {mark.samples} samples {_told(mark, config)}" for mark in marks)
        raise Refused(
            f"stop: no checkpoint is as good elsewhere as the distilled student ({told}) - lower "
            "train.optimizer.learning_rate or raise prior_share, or stop.most_lost where the exam is small"
        )
    return min(allowed, key=lambda mark: (mark.score, mark.samples))


def enough(marks: Sequence[Marked], config: StopConfig) -> str | None:
    """Why training ends after the last of these checkpoints; None when it goes on."""
    if not marks:
        return None
    if marks[-1].loser(config) is not None:
        return f"ended, {_told(marks[-1], config)}"
    top = best(marks, config)
    since = sum(mark.samples > top.samples for mark in marks)
    if since < config.patience:
        return None
    return f"ended, no better score in {since} checkpoints than {top.score:.4f} after {top.samples} samples"


def _told(mark: Marked, config: StopConfig) -> str:
    name = mark.loser(config)
    return f"{name} has lost {mark.lost[name]:.1f} points" if name is not None else "nothing is lost"
