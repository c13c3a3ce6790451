"""The exam at checkpoints: when class finetuning ends early, and which checkpoint is the best.

Both are functions of the journal's events at the checkpoints so far, so a resumed run decides as an uninterrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from configs.values import PictureSize, Strict
from stages.classes.exam import ALL_SHOWN, Exam, ExamConfig, MetricsByClass
from stages.evaluate.metrics import Scorer, refuse_blind_scorer
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.sampling.grids import grid_hook
from stages.system.refusal import Refused
from stages.train.journal import read_events
from stages.train.loop import Hooks

EVENT_KIND = "classes"
PERCENT = 100.0


class StopConfig(Strict):
    """End when the classes gain no more, or anything else loses, and take the best checkpoint.

    A small exam is noisy: of 16 pictures one is 6 points, and a share of .95 has a standard error of 5. So this is off
    by default, and better used with a larger `exam.checkpoint_pictures`.
    """

    patience: int = Field(3, ge=1, description="checkpoints in a row without a better score after which training ends")
    most_lost: float | None = Field(
        20.0,
        gt=0,
        description="points (percent of right pictures) that no class, nor prompts outside all classes, may lose "
        "against the distilled student; needs a scorer; none: no limit",
    )


@dataclass(frozen=True)
class CheckpointScore:
    """The exam at one checkpoint."""

    samples: int
    score: float
    """lower is better"""
    points_lost: Mapping[str, float]
    """points lost against the distilled student, by class and outside of all; empty without a scorer"""

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> "CheckpointScore":
        """From the journal's event."""
        return cls(event["samples"], event["wrong"], event.get("lost", {}))

    def regressed_class(self, config: StopConfig) -> str | None:
        """The class that lost most, if it lost more than `most_lost`."""
        worst = max(self.points_lost, key=lambda name: self.points_lost[name], default=None)
        most = config.most_lost
        return worst if worst is not None and most is not None and self.points_lost[worst] > most else None


def best_checkpoint(scores: Sequence[CheckpointScore], config: StopConfig) -> CheckpointScore:
    """The checkpoint with the lowest score of those without a regressed class; the earlier of two equal ones.

    Raises `Refused` when there is none.
    """
    allowed = [one for one in scores if one.regressed_class(config) is None]
    if not allowed:
        losses = "; ".join(f"after {one.samples} samples {_describe_loss(one, config)}" for one in scores)
        raise Refused(
            f"stop: no checkpoint is as good elsewhere as the distilled student ({losses}) - lower "
            "train.optimizer.learning_rate or raise prior_share, or stop.most_lost where the exam is small"
        )
    return min(allowed, key=lambda one: (one.score, one.samples))


def stop_reason(scores: Sequence[CheckpointScore], config: StopConfig) -> str | None:
    """Why training ends after the last of these checkpoints; None when it goes on."""
    if not scores:
        return None
    if scores[-1].regressed_class(config) is not None:
        return f"ended, {_describe_loss(scores[-1], config)}"
    best = best_checkpoint(scores, config)
    since = sum(one.samples > best.samples for one in scores)
    if since < config.patience:
        return None
    return f"ended, no better score in {since} checkpoints than {best.score:.4f} after {best.samples} samples"


def _describe_loss(checkpoint: CheckpointScore, config: StopConfig) -> str:
    name = checkpoint.regressed_class(config)
    return f"{name} has lost {checkpoint.points_lost[name]:.1f} points" if name is not None else "nothing is lost"


@dataclass(frozen=True)
class ExamResult:
    """The metrics of a checkpoint's student, and those of the distilled student."""

    current: MetricsByClass
    baseline: MetricsByClass
    weights: Mapping[str, float]
    stop: StopConfig | None = None
    kind: ClassVar[str] = EVENT_KIND

    @property
    def value(self) -> float | None:
        """The share of wrong pictures, or the paired error without a scorer: the mean over classes by weight.

        None where no class has a weight.
        """
        if not self.weights:
            return None
        own = {name: self.current[name] for name in self.weights}
        wrong = {name: 1 - one[ALL_SHOWN] if ALL_SHOWN in one else one["paired_error"] for name, one in own.items()}
        return sum(weight * wrong[name] for name, weight in self.weights.items()) / sum(self.weights.values())

    @property
    def points_lost(self) -> dict[str, float]:
        """Points lost, of each class and outside of all; empty without a scorer."""
        return {
            name: PERCENT * (self.baseline[name][ALL_SHOWN] - metrics[ALL_SHOWN])
            for name, metrics in self.current.items()
            if ALL_SHOWN in metrics
        }

    @property
    def score(self) -> float | None:
        """The value; None where a class regressed, for such a checkpoint is never the best."""
        value = self.value
        if value is None or self.stop is None:
            return value
        return None if CheckpointScore(0, value, self.points_lost).regressed_class(self.stop) else value

    def metrics(self) -> dict[str, Any]:
        """The content of the journal's event."""
        by_class = {
            quantity: {name: one[quantity] for name, one in self.current.items()}
            for quantity in (ALL_SHOWN, "paired_error")
            if all(quantity in one for one in self.current.values())
        }
        wrong = {} if self.value is None else {"wrong": self.value}
        return {**wrong, **by_class, **({"lost": self.points_lost} if self.points_lost else {})}


class ClassMonitor:
    """Examines the student of each checkpoint, and decides from the journal in `folder` when training ends.

    All decisions follow from files; the distilled student is examined once for each start of a run.
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
        sizes: Sequence[PictureSize] = (),
    ) -> None:
        """`load_distilled` loads the student at the start of training; `weights` are those of the classes in the score.

        The grids show pictures of all `sizes`, the exam those of the teacher's own size, or else the first.

        Raises `Refused` where training ends by a score, and no class has one.
        """
        if stop is not None and not weights:
            raise Refused("stop: there is no scorer, and no teacher for photographs - name a scorer, or leave stop out")
        self.weights, self.stop, self.folder = weights, stop, folder
        self._load_distilled, self._baseline = load_distilled, dict[str, dict[str, float]]()
        native = teacher.components.native_size
        size = sizes[0] if sizes and native not in sizes else native
        if scorer is not None and size != native:
            text = next(iter(prompts.values()))[0].text
            hint = f"leave scorer out, or let render.sizes hold {native}, at which the exam then is"
            refuse_blind_scorer(scorer, text, size, hint)
        self._checkpoint_exam = Exam(teacher, prompts, scorer, config, config.checkpoint_pictures, size)
        self._full_exam = Exam(teacher, prompts, scorer, config, size=size)
        texts = [own[0].text for own in prompts.values()]
        labels = [f"{name}: {text}" for name, text in zip(prompts, texts, strict=True)]
        titles, settings = ("teacher", "distilled", "finetuned"), {"prompts": texts, **config.model_dump(mode="json")}
        self._save_grid = grid_hook(
            teacher,
            texts,
            labels,
            titles,
            config.seed,
            (config.sampler,),
            folder / "grids",
            settings,
            load_distilled,
            sizes,
        )

    def hooks(self) -> Hooks:
        """For the training loop."""
        return Hooks(validate=self, on_checkpoint=self._save_grid, stop_reason=self.stop_reason)

    def __call__(self, student: Student) -> ExamResult:
        """Examine a checkpoint's student with few pictures of each class."""
        self._baseline = self._baseline or self._checkpoint_exam(self._load_distilled())
        return ExamResult(self._checkpoint_exam(student), self._baseline, self.weights, self.stop)

    def compare_models(self, student: Student) -> dict[str, dict[str, dict[str, float]]]:
        """The full exam of the distilled student and of this one."""
        return {"before": self._full_exam(self._load_distilled()), "after": self._full_exam(student)}

    def stop_reason(self, samples: int) -> str | None:
        """Why training ends after so many samples; None when it goes on."""
        return None if self.stop is None else stop_reason(self._checkpoint_scores(samples), self.stop)

    def best_checkpoint(self, samples: int) -> int:
        """The checkpoint to export after so many samples: the last, or with `stop` the best."""
        return samples if self.stop is None else best_checkpoint(self._checkpoint_scores(samples), self.stop).samples

    def _checkpoint_scores(self, samples: int) -> list[CheckpointScore]:
        return [CheckpointScore.from_event(event) for event in read_events(self.folder, EVENT_KIND, samples)]
