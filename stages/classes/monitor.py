"""When training on classes ends before its last sample, and which of its checkpoints is the best.

Both are functions of what the journal tells of the checkpoints so far, so a run that goes on decides as one that was
never left.

The classes at each checkpoint: what the student draws of each, against the distilled student that it began as.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from configs.values import Strict
from stages.classes.exam import ALL_SHOWN, Exam, ExamConfig, class_grid_hook
from stages.evaluate.metrics import Scorer
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.system.refusal import Refused
from stages.train.journal import read_events
from stages.train.loop import Hooks

PERCENT = 100.0


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
class CheckpointScore:
    """What one checkpoint was worth."""

    samples: int
    score: float
    """the lower the better"""
    points_lost: Mapping[str, float]
    """points lost against the start, of each class and of the rest; empty where nobody counts right pictures"""

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> "CheckpointScore":
        """What a line of the journal says."""
        return cls(event["samples"], event["wrong"], event.get("lost", {}))

    def regressed_class(self, config: StopConfig) -> str | None:
        """What lost more than it may, if anything did."""
        worst = max(self.points_lost, key=lambda name: self.points_lost[name], default=None)
        most = config.most_lost
        return worst if worst is not None and most is not None and self.points_lost[worst] > most else None


def best_checkpoint(scores: Sequence[CheckpointScore], config: StopConfig) -> CheckpointScore:
    """The checkpoint with the lowest score of those that lose nothing; the earlier of two equal ones.

    Raises `Refused` when there is none.
    """
    allowed = [mark for mark in scores if mark.regressed_class(config) is None]
    if not allowed:
        told = "; ".join(f"after {mark.samples} samples {_describe_loss(mark, config)}" for mark in scores)
        raise Refused(
            f"stop: no checkpoint is as good elsewhere as the distilled student ({told}) - lower "
            "train.optimizer.learning_rate or raise prior_share, or stop.most_lost where the exam is small"
        )
    return min(allowed, key=lambda mark: (mark.score, mark.samples))


def stop_reason(scores: Sequence[CheckpointScore], config: StopConfig) -> str | None:
    """Why training ends after the last of these checkpoints; None when it goes on."""
    if not scores:
        return None
    if scores[-1].regressed_class(config) is not None:
        return f"ended, {_describe_loss(scores[-1], config)}"
    top = best_checkpoint(scores, config)
    since = sum(mark.samples > top.samples for mark in scores)
    if since < config.patience:
        return None
    return f"ended, no better score in {since} checkpoints than {top.score:.4f} after {top.samples} samples"


def _describe_loss(checkpoint: CheckpointScore, config: StopConfig) -> str:
    name = checkpoint.regressed_class(config)
    return f"{name} has lost {checkpoint.points_lost[name]:.1f} points" if name is not None else "nothing is lost"


EVENT_KIND = "classes"
MetricsByClass = Mapping[str, Mapping[str, float]]
"""Class -> quantity -> value."""


@dataclass(frozen=True)
class ExamResult:
    """What an exam found, beside what it found of the distilled student."""

    current: MetricsByClass
    baseline: MetricsByClass
    weights: Mapping[str, float]
    stop: StopConfig | None = None

    @property
    def kind(self) -> str:
        """What the journal calls it."""
        return EVENT_KIND

    @property
    def value(self) -> float | None:
        """The share of wrong pictures, or the paired error where nobody counts; the mean over classes by weight.

        None where no class has any.
        """
        if not self.weights:
            return None
        wrong = {
            name: 1 - found[ALL_SHOWN] if ALL_SHOWN in found else found["paired_error"]
            for name, found in self.current.items()
        }
        return sum(weight * wrong[name] for name, weight in self.weights.items()) / sum(self.weights.values())

    @property
    def points_lost(self) -> dict[str, float]:
        """Points lost, of each class and of what lies outside; empty where nobody counts right pictures."""
        return {
            name: PERCENT * (self.baseline[name][ALL_SHOWN] - found[ALL_SHOWN])
            for name, found in self.current.items()
            if ALL_SHOWN in found
        }

    @property
    def score(self) -> float | None:
        """The value; None where more is lost than may be, for this is never the best."""
        value = self.value
        lost = (
            self.stop and value is not None and CheckpointScore(0, value, self.points_lost).regressed_class(self.stop)
        )
        return None if lost else value

    def metrics(self) -> dict[str, Any]:
        """What the journal writes."""
        shown = [
            quantity
            for quantity in (ALL_SHOWN, "paired_error")
            if all(quantity in one for one in self.current.values())
        ]
        by_class = {quantity: {name: one[quantity] for name, one in self.current.items()} for quantity in shown}
        wrong = {} if self.value is None else {"wrong": self.value}
        return {**wrong, **by_class, **({"lost": self.points_lost} if self.points_lost else {})}


class ClassMonitor:
    """Examines the student of each checkpoint, and says from the journal of the run in `folder` when it is enough.

    Everything is a function of what lies on the disk, and the distilled student is asked once in each life of a run.
    """

    def __init__(
        self,
        teacher: Teacher,
        load_distilled: Callable[[], Student],
        prompts: Mapping[str, Sequence[Prompt]],
        weights: Mapping[str, float],
        scorer: Scorer | None,
        config: ExamConfig,
        stop: StopConfig | None,
        folder: Path,
    ) -> None:
        """`distilled` brings the student that training begins with; `weights` tell what each class counts.

        Raises `Refused` when training shall end by the score of classes none of which has one.
        """
        if stop is not None and not weights:
            raise Refused("stop: there is no scorer, and no teacher for photographs - name a scorer, or leave stop out")
        self.weights, self.stop, self.folder = weights, stop, folder
        self._load_distilled, self._baseline = load_distilled, dict[str, dict[str, float]]()
        self._checkpoint_exam = Exam(teacher, prompts, scorer, config, config.checkpoint_pictures)
        self._full_exam = Exam(teacher, prompts, scorer, config)
        self._save_grid = class_grid_hook(teacher, load_distilled, prompts, config, folder / "grids")

    def hooks(self) -> Hooks:
        """What training calls."""
        return Hooks(validate=self, on_checkpoint=self._save_grid, stop_reason=self.stop_reason)

    def __call__(self, student: Student) -> ExamResult:
        """Ask a checkpoint's student a few pictures of each class."""
        self._baseline = self._baseline or self._checkpoint_exam(self._load_distilled())
        return ExamResult(self._checkpoint_exam(student), self._baseline, self.weights, self.stop)

    def compare_models(self, student: Student) -> dict[str, dict[str, dict[str, float]]]:
        """Ask for all pictures, before and after."""
        return {"before": self._full_exam(self._load_distilled()), "after": self._full_exam(student)}

    def stop_reason(self, samples: int) -> str | None:
        """Why training ends after so many samples; None when it goes on."""
        return None if self.stop is None else stop_reason(self._checkpoint_scores(samples), self.stop)

    def best_checkpoint(self, samples: int) -> int:
        """The checkpoint to take after so many samples: the newest, or the best where training ends by the score."""
        return samples if self.stop is None else best_checkpoint(self._checkpoint_scores(samples), self.stop).samples

    def _checkpoint_scores(self, samples: int) -> list[CheckpointScore]:
        return [CheckpointScore.from_event(note) for note in read_events(self.folder, EVENT_KIND, samples)]
