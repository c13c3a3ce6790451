"""What a student makes of prompts it never saw, and of seen ones under new noise: how much it learnt by heart."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.strict import Strict
from shards.batch import Batch, collate
from shards.reader import Reader
from shards.record import Record
from stages.flow.path import Linear, point
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed
from stages.train.velocity import RelativeError, VelocityErrors, held_out, velocity_errors

ROWS_AT_ONCE = 16


class ValidationConfig(Strict):
    """On how many states the averaged student is measured at each checkpoint."""

    states: int = Field(
        160, ge=0, description="held-out states, and as many seen ones, as stored and under new noise; 0 for none"
    )


@dataclass(frozen=True)
class Validated:
    """The student's errors relative to the teacher's velocities; the seen ones are None where the cache has none."""

    held_out: VelocityErrors
    seen: RelativeError | None
    """At states of seen prompts as the cache holds them."""
    seen_new_noise: RelativeError | None
    """At the same prompts and times under noise that no cache holds."""
    seconds: float

    @property
    def kind(self) -> str:
        """What the journal calls it."""
        return "validation"

    @property
    def score(self) -> float:
        """What the best checkpoint has least of."""
        return self.held_out.velocity.overall

    def told(self) -> dict[str, Any]:
        """What the journal writes."""
        line: dict[str, Any] = {**_told("held_out", self.held_out.velocity)}
        line["held_out_guidance"] = self.held_out.guidance.overall
        if self.seen and self.seen_new_noise:
            line |= {**_told("seen", self.seen), **_told("seen_new_noise", self.seen_new_noise)}
            line["cache_gap"] = self.seen_new_noise.overall - self.seen.overall
            line["cache_gap_by_s"] = [
                None if new is None or old is None else new - old
                for new, old in zip(self.seen_new_noise.by_bin, self.seen.by_bin, strict=True)
            ]
        return {**line, "seconds": self.seconds}


Known = tuple[Float[Tensor, "b c h w"], Batch]
"""The finished pictures of some rows, and the rows."""


class Validation:
    """Fixed states, made once, by whoever asks first: the same for every checkpoint, and for every life of a run."""

    def __init__(self, config: ValidationConfig, unseen: Reader, seen: Reader, teacher: Teacher, seed: int = 0) -> None:
        """`unseen` reads the split for validation, `seen` what is trained on; `teacher` answers at the new states."""
        self._states, self._readers, self._teacher, self._seed = config.states, (unseen, seen), teacher, seed

    @cached_property
    def _held_out(self) -> tuple[Batch, ...]:
        return tuple(held_out(self._readers[0], self._states, ROWS_AT_ONCE))

    @cached_property
    def _seen(self) -> tuple[Known, ...]:
        return tuple(seen_states(self._readers[1], self._states))

    @cached_property
    def _anew(self) -> tuple[Batch, ...]:
        return tuple(noised_anew(self._teacher, self._seen, self._seed))

    def announced(self) -> str:
        """What will be measured, and what cannot be."""
        held, seen = (sum(map(len, batches)) for batches in (self._held_out, self._anew))
        if not held:
            return "validation: none asked for"
        twins = (
            f"{seen} seen ones and their twins under new noise"
            if seen
            else ("no seen ones: the cache holds no renoised state, so its gap is not measured")
        )
        return f"validation: {held} held-out states, {twins}"

    def __call__(self, student: Student) -> Validated | None:
        """Measure, if there is anything to measure at; the student should be in eval mode and wear its average."""
        if not self._held_out:
            return None
        begun = time.perf_counter()
        unseen = velocity_errors(student, self._held_out, self._teacher.uncond)
        seen, anew = (
            velocity_errors(student, batches, self._teacher.uncond).velocity if batches else None
            for batches in ([batch for _, batch in self._seen], self._anew)
        )
        return Validated(unseen, seen, anew, time.perf_counter() - begun)


def seen_states(reader: Reader, most: int) -> Iterator[Known]:
    """The first states of a stream that are renoised pictures: only those have a twin under other noise.

    A state on a guided trajectory has not the distribution of a noised picture, so comparing the two would measure
    that difference too.
    """
    rows: list[tuple[Record, int]] = []
    for first in range(0, reader.samples_per_epoch if most else 0, ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, reader.samples_per_epoch)
        places = zip(*reader.order.at(np.arange(first, last)), strict=True)
        found = ((reader.number(int(record)), int(draw)) for record, draw in places)
        rows += [(record, draw) for record, draw in found if not record.draws.trajectory[draw]]
        if len(rows) >= most:
            break
    rows = rows[:most]
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield _known(rows[first : first + ROWS_AT_ONCE])


def noised_anew(teacher: Teacher, seen: Sequence[Known], seed: int) -> Iterator[Batch]:
    """The same prompts at the same times under fresh noise, and what the teacher answers there.

    As in the cache: x is rounded to what is stored before the teacher is asked, and so are his answers.
    """
    uncond = teacher.uncond.half()
    for number, (x0, batch) in enumerate(seen):
        generator = torch.Generator().manual_seed(derived_seed("validation", seed, number))
        x = point(Linear(), x0.float(), torch.randn(x0.shape, generator=generator), batch.s).half()
        at = replace(batch, x_t=x).to(uncond.device, torch.float32)
        said = teacher.answer(at.x_t, at.s, at.k, at.cond.half(), uncond)
        yield replace(batch, x_t=x, v_cond=said.v_cond.half().cpu(), v_uncond=said.v_uncond.half().cpu())


def _known(rows: Sequence[tuple[Record, int]]) -> Known:
    records, draws = zip(*rows, strict=True)
    return torch.stack([record.x0 for record in records]), collate(records, draws)


def _told(name: str, error: RelativeError) -> dict[str, Any]:
    return {name: error.overall, f"{name}_by_s": list(error.by_bin)}
