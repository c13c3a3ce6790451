"""The gate of a polish: it ends at the first checkpoint whose paired score is low enough."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from shards.stream.schedule import SizeSchedule
from stages.evaluate.paired import PairedError, TeacherReference
from stages.nets.run_folder import load_student, open_run
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.sampling.fields import student_field
from stages.train.journal import read_events
from stages.train.loop import CheckpointResult, is_due
from stages.train.validation import Validation, ValidationResult

PAIRED_SCORE = "paired_score"
"""Entry of the journal's event at a checkpoint."""


@dataclass(frozen=True)
class GatedResult:
    """The validation of a checkpoint, and the paired score by which the polish ends."""

    validation: ValidationResult | None
    paired: PairedError
    kind: ClassVar[str] = "validation"

    @property
    def score(self) -> float | None:
        """The best checkpoint has the least."""
        return self.paired.score

    def metrics(self) -> Mapping[str, Any]:
        """Content of the journal's event."""
        return {**(self.validation.metrics() if self.validation else {}), PAIRED_SCORE: self.paired.score}


@dataclass(frozen=True)
class DueCheckpoints:
    """The checkpoints of a run at its regular moments; a signal leaves others between them."""

    folder: Path
    schedule: SizeSchedule
    every_samples: int

    def is_due(self, samples: int) -> bool:
        """Whether a checkpoint after so many samples is one of them."""
        before = self.schedule.first_sample(self.schedule.block_of(samples) - 1) if samples else 0
        return is_due(before, samples, self.every_samples)


class Gate:
    """Measures each checkpoint's student, and ends the polish at the first one whose score is `limit` or less.

    All decisions follow from files, so a run that was killed or interrupted ends where an uninterrupted one does.
    """

    def __init__(
        self,
        limit: float,
        make_reference: Callable[[], TeacherReference],
        steps: int,
        validation: Validation,
        checkpoints: DueCheckpoints,
        teacher: Teacher,
    ) -> None:
        """`make_reference` samples the fine-tune, once, when the first score is needed."""
        self.limit, self.steps, self.validation = limit, steps, validation
        self.checkpoints, self.teacher = checkpoints, teacher
        self._make_reference = make_reference

    @cached_property
    def _reference(self) -> TeacherReference:
        return self._make_reference()

    def __call__(self, student: Student) -> CheckpointResult:
        """Validate a checkpoint's averaged student, and measure its paired score."""
        return GatedResult(self.validation(student), self._measure(student))

    def stop_reason(self, samples: int) -> str | None:
        """Why the polish ends after so many samples; None when it goes on."""
        score = self._score_after(samples)
        if score is None or score > self.limit:
            return None
        return f"ended after {samples} samples, its paired score {score:.3f} is {self.limit:g} or less"

    def _score_after(self, samples: int) -> float | None:
        folder = self.checkpoints.folder
        for event in reversed(read_events(folder, GatedResult.kind, samples)):
            if event["samples"] == samples:
                score: float | None = event[PAIRED_SCORE]
                return score
        if not samples or not self.checkpoints.is_due(samples):
            return None
        # A signal that comes in the step of a regular checkpoint leaves it unmeasured.
        return self._measure(load_student(open_run(folder, samples), self.teacher.components)).score

    def _measure(self, student: Student) -> PairedError:
        reference = self._reference
        return reference.summarise(reference.picture_errors(student_field(student), self.steps), self.steps)
