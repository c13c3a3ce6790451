"""How far a student's velocities are from its teacher's, in all and in each bin of s.

What a student makes of prompts it never saw, and of seen ones under new noise: how much it learnt by heart.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.values import Strict
from shards.batch import Batch, collate
from shards.reader import Reader
from shards.record import Record
from stages.flow.path import LinearPath, interpolate
from stages.flow.timesteps import bin_of_time
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed

VALIDATION_BINS = 5
DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class RelativeError:
    """sum |v - v*|^2 / sum |v*|^2 over all states, and over those of each bin of s (None for an empty bin)."""

    overall: float
    by_bin: tuple[float | None, ...]


@dataclass(frozen=True)
class VelocityErrors:
    """Errors of the velocity, both branches together, and of the guidance difference v_cond - v_uncond."""

    velocity: RelativeError
    guidance: RelativeError
    states: int


class _ErrorSums:
    """Squared errors and squared targets, added up in each bin in float64."""

    def __init__(self, bins: int) -> None:
        self.error, self.target = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)

    def add(self, bin_index: Tensor, v: Float[Tensor, "b ..."], v_star: Float[Tensor, "b ..."]) -> None:
        wrong = (v.float() - v_star.float()).square().flatten(1).sum(1, dtype=torch.float64)
        whole = v_star.float().square().flatten(1).sum(1, dtype=torch.float64)
        self.error.index_add_(0, bin_index.cpu(), wrong.cpu())
        self.target.index_add_(0, bin_index.cpu(), whole.cpu())

    def ratio(self) -> RelativeError:
        by_bin = [float(e / t) if t > 0 else None for e, t in zip(self.error, self.target, strict=True)]
        return RelativeError(float(self.error.sum() / self.target.sum()), tuple(by_bin))


@torch.inference_mode()
def velocity_errors(
    student: Student, batches: Iterable[Batch], uncond: Float[Tensor, "1 l d"], bins: int = VALIDATION_BINS
) -> VelocityErrors:
    """The student against the cached answers of its teacher."""
    velocity, guidance, states = _ErrorSums(bins), _ErrorSums(bins), 0
    for batch in batches:
        batch = batch.to(uncond.device, torch.float32)
        out, where = student(batch.x_t, batch.s, batch.cond, uncond), bin_of_time(batch.s, bins)
        velocity.add(where, out.v_cond, batch.v_cond)
        velocity.add(where, out.v_uncond, batch.v_uncond)
        guidance.add(where, out.v_cond - out.v_uncond, batch.v_cond - batch.v_uncond)
        states += len(batch.keys)
    return VelocityErrors(velocity.ratio(), guidance.ratio(), states)


def read_first_states(reader: Reader, max_states: int, batch_size: int = DEFAULT_BATCH_SIZE) -> Iterator[Batch]:
    """The first states of a split, each once: up to so many, or all of them."""
    count = min(max_states, reader.samples_per_epoch)
    for first in range(0, count, batch_size):
        yield reader.batch(np.arange(first, min(first + batch_size, count)))


VALIDATION_BATCH_SIZE = 16


class ValidationConfig(Strict):
    """On how many states the averaged student is measured at each checkpoint."""

    states: int = Field(
        160, ge=0, description="held-out states, and as many seen ones, as stored and under new noise; 0 for none"
    )


@dataclass(frozen=True)
class ValidationResult:
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

    def metrics(self) -> dict[str, Any]:
        """What the journal writes."""
        line: dict[str, Any] = {**_error_metrics("held_out", self.held_out.velocity)}
        line["held_out_guidance"] = self.held_out.guidance.overall
        if self.seen and self.seen_new_noise:
            line |= {**_error_metrics("seen", self.seen), **_error_metrics("seen_new_noise", self.seen_new_noise)}
            line["cache_gap"] = self.seen_new_noise.overall - self.seen.overall
            line["cache_gap_by_s"] = [
                None if new is None or old is None else new - old
                for new, old in zip(self.seen_new_noise.by_bin, self.seen.by_bin, strict=True)
            ]
        return {**line, "seconds": self.seconds}


PicturesAndBatch = tuple[Float[Tensor, "b c h w"], Batch]
"""The finished pictures of some rows, and the rows."""


class Validation:
    """Fixed states, made once, by whoever asks first: the same for every checkpoint, and for every life of a run."""

    def __init__(
        self, config: ValidationConfig, held_out: Reader, seen: Reader, teacher: Teacher, seed: int = 0
    ) -> None:
        """`unseen` reads the split for validation, `seen` what is trained on; `teacher` answers at the new states."""
        self._states, self._readers, self._teacher, self._seed = config.states, (held_out, seen), teacher, seed

    @cached_property
    def _held_out(self) -> tuple[Batch, ...]:
        return tuple(read_first_states(self._readers[0], self._states, VALIDATION_BATCH_SIZE))

    @cached_property
    def _seen(self) -> tuple[PicturesAndBatch, ...]:
        return tuple(seen_states(self._readers[1], self._states))

    @cached_property
    def _renoised(self) -> tuple[Batch, ...]:
        return tuple(renoise(self._teacher, self._seen, self._seed))

    def summary(self) -> str:
        """What will be measured, and what cannot be."""
        held, seen = (sum(map(len, batches)) for batches in (self._held_out, self._renoised))
        if not held:
            return "validation: none asked for"
        twins = (
            f"{seen} seen ones and their twins under new noise"
            if seen
            else ("no seen ones: the cache holds no renoised state, so its gap is not measured")
        )
        return f"validation: {held} held-out states, {twins}"

    def __call__(self, student: Student) -> ValidationResult | None:
        """Measure, if there is anything to measure at; the student should be in eval mode and wear its average."""
        if not self._held_out:
            return None
        begun = time.perf_counter()
        unseen = velocity_errors(student, self._held_out, self._teacher.uncond)
        seen, anew = (
            velocity_errors(student, batches, self._teacher.uncond).velocity if batches else None
            for batches in ([batch for _, batch in self._seen], self._renoised)
        )
        return ValidationResult(unseen, seen, anew, time.perf_counter() - begun)


def seen_states(reader: Reader, max_states: int) -> Iterator[PicturesAndBatch]:
    """The first states of a stream that are renoised pictures: only those have a twin under other noise.

    A state on a guided trajectory has not the distribution of a noised picture, so comparing the two would measure
    that difference too.
    """
    rows: list[tuple[Record, int]] = []
    for first in range(0, reader.samples_per_epoch if max_states else 0, VALIDATION_BATCH_SIZE):
        last = min(first + VALIDATION_BATCH_SIZE, reader.samples_per_epoch)
        places = zip(*reader.order.at(np.arange(first, last)), strict=True)
        found = ((reader.record_at(int(record)), int(draw)) for record, draw in places)
        rows += [(record, draw) for record, draw in found if not record.states.trajectory[draw]]
        if len(rows) >= max_states:
            break
    rows = rows[:max_states]
    for first in range(0, len(rows), VALIDATION_BATCH_SIZE):
        yield _collate_with_pictures(rows[first : first + VALIDATION_BATCH_SIZE])


def renoise(teacher: Teacher, seen: Sequence[PicturesAndBatch], seed: int) -> Iterator[Batch]:
    """The same prompts at the same times under fresh noise, and what the teacher answers there.

    As in the cache: x is rounded to what is stored before the teacher is asked, and so are his answers.
    """
    uncond = teacher.uncond.half()
    for number, (x0, batch) in enumerate(seen):
        generator = torch.Generator().manual_seed(derived_seed("validation", seed, number))
        x = interpolate(LinearPath(), x0.float(), torch.randn(x0.shape, generator=generator), batch.s).half()
        at = replace(batch, x_t=x).to(uncond.device, torch.float32)
        said = teacher.predict(at.x_t, at.s, at.k, at.cond.half(), uncond)
        yield replace(batch, x_t=x, v_cond=said.v_cond.half().cpu(), v_uncond=said.v_uncond.half().cpu())


def _collate_with_pictures(rows: Sequence[tuple[Record, int]]) -> PicturesAndBatch:
    records, draws = zip(*rows, strict=True)
    return torch.stack([record.x0 for record in records]), collate(records, draws)


def _error_metrics(name: str, error: RelativeError) -> dict[str, Any]:
    return {name: error.overall, f"{name}_by_s": list(error.by_bin)}
