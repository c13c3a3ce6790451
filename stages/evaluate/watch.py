"""The classes at each checkpoint: what the student draws of each, against the distilled student that it began as."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.refusal import Refused
from stages.evaluate.class_grid import class_grids
from stages.evaluate.metrics import Scorer
from stages.evaluate.per_class import ALL, Exam, ExamConfig
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.train.hooks import Hooks
from stages.train.journal import notes
from stages.train.stop import POINTS, Marked, StopConfig, best, enough

KIND = "classes"
Found = Mapping[str, Mapping[str, float]]
"""Class -> quantity -> value."""


@dataclass(frozen=True)
class Watched:
    """What an exam found, beside what it found of the distilled student."""

    now: Found
    before: Found
    weights: Mapping[str, float]
    stop: StopConfig | None = None

    @property
    def kind(self) -> str:
        """What the journal calls it."""
        return KIND

    @property
    def value(self) -> float | None:
        """The share of wrong pictures, or the paired error where nobody counts; the mean over classes by weight.

        None where no class has any.
        """
        if not self.weights:
            return None
        wrong = {name: 1 - found[ALL] if ALL in found else found["paired_error"] for name, found in self.now.items()}
        return sum(weight * wrong[name] for name, weight in self.weights.items()) / sum(self.weights.values())

    @property
    def lost(self) -> dict[str, float]:
        """Points lost, of each class and of what lies outside; empty where nobody counts right pictures."""
        return {
            name: POINTS * (self.before[name][ALL] - found[ALL]) for name, found in self.now.items() if ALL in found
        }

    @property
    def score(self) -> float | None:
        """The value; None where more is lost than may be, for this is never the best."""
        value = self.value
        lost = self.stop and value is not None and Marked(0, value, self.lost).loser(self.stop)
        return None if lost else value

    def told(self) -> dict[str, Any]:
        """What the journal writes."""
        shown = [quantity for quantity in (ALL, "paired_error") if all(quantity in one for one in self.now.values())]
        by_class = {quantity: {name: one[quantity] for name, one in self.now.items()} for quantity in shown}
        wrong = {} if self.value is None else {"wrong": self.value}
        return {**wrong, **by_class, **({"lost": self.lost} if self.lost else {})}


class Watch:
    """Examines the student of each checkpoint, and says from the journal of the run in `folder` when it is enough.

    Everything is a function of what lies on the disk, and the distilled student is asked once in each life of a run.
    """

    def __init__(
        self,
        teacher: Teacher,
        distilled: Callable[[], Student],
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
        self._distilled, self._before = distilled, dict[str, dict[str, float]]()
        self._few = Exam(teacher, prompts, scorer, config, config.checkpoint_pictures)
        self._whole = Exam(teacher, prompts, scorer, config)
        self._draw = class_grids(teacher, distilled, prompts, config, folder / "grids")

    def hooks(self) -> Hooks:
        """What training calls."""
        return Hooks(validate=self, at_checkpoint=self._draw, enough=self.enough)

    def __call__(self, student: Student) -> Watched:
        """Ask a checkpoint's student a few pictures of each class."""
        self._before = self._before or self._few(self._distilled())
        return Watched(self._few(student), self._before, self.weights, self.stop)

    def results(self, student: Student) -> dict[str, dict[str, dict[str, float]]]:
        """Ask for all pictures, before and after."""
        return {"before": self._whole(self._distilled()), "after": self._whole(student)}

    def enough(self, samples: int) -> str | None:
        """Why training ends after so many samples; None when it goes on."""
        return None if self.stop is None else enough(self._marks(samples), self.stop)

    def best(self, samples: int) -> int:
        """The checkpoint to take after so many samples: the newest, or the best where training ends by the score."""
        return samples if self.stop is None else best(self._marks(samples), self.stop).samples

    def _marks(self, samples: int) -> list[Marked]:
        return [Marked.read(note) for note in notes(self.folder, KIND, samples)]
