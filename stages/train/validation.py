"""Errors of a student's velocities relative to its teacher's, and their measurement at checkpoints.

Held-out states show generalisation; the gap between seen prompts under stored and under new noise shows memorisation.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from configs.values import PictureSize, Strict
from shards.batch import Batch, collate
from shards.reader import Reader
from shards.record import Record
from shards.stream.order import Order
from shards.stream.schedule import SizeSchedule
from stages.flow.path import interpolate
from stages.flow.timesteps import bin_of_time
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.prompts import derived_seed

VALIDATION_BINS = 5
DEFAULT_BATCH_SIZE, VALIDATION_BATCH_SIZE = 64, 16


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
    velocity_by_size: Mapping[PictureSize, float] = field(default_factory=dict)
    """of each picture size where there are several"""


class _ErrorSums:
    """Squared errors and squared targets, summed in each bin in float64."""

    def __init__(self) -> None:
        self.error, self.target = torch.zeros(2, VALIDATION_BINS, dtype=torch.float64)

    def add(self, bin_index: Tensor, v: Float[Tensor, "b ..."], v_star: Float[Tensor, "b ..."]) -> None:
        error = (v.float() - v_star.float()).square().flatten(1).sum(1, dtype=torch.float64)
        target = v_star.float().square().flatten(1).sum(1, dtype=torch.float64)
        self.error.index_add_(0, bin_index.cpu(), error.cpu())
        self.target.index_add_(0, bin_index.cpu(), target.cpu())

    def ratio(self) -> RelativeError:
        by_bin = [float(e / t) if t > 0 else None for e, t in zip(self.error, self.target, strict=True)]
        return RelativeError(float(self.error.sum() / self.target.sum()), tuple(by_bin))


@torch.inference_mode()
def velocity_errors(student: Student, batches: Iterable[Batch], uncond: Float[Tensor, "1 l d"]) -> VelocityErrors:
    """The student's errors relative to the cached predictions of its teacher."""
    velocity, guidance, states = _ErrorSums(), _ErrorSums(), 0
    by_size: dict[PictureSize | None, _ErrorSums] = {}
    for batch in batches:
        batch = batch.to(uncond.device, torch.float32)
        output, bin_index = student(batch.x_s, batch.s, batch.cond, uncond), bin_of_time(batch.s, VALIDATION_BINS)
        for sums in (velocity, by_size.setdefault(batch.size, _ErrorSums())):
            sums.add(bin_index, output.v_cond, batch.v_cond)
            sums.add(bin_index, output.v_uncond, batch.v_uncond)
        guidance.add(bin_index, output.v_cond - output.v_uncond, batch.v_cond - batch.v_uncond)
        states += len(batch.keys)
    known = {size: sums.ratio().overall for size, sums in by_size.items() if size is not None and len(by_size) > 1}
    return VelocityErrors(velocity.ratio(), guidance.ratio(), states, known)


class SizePart(NamedTuple):
    """The states of one picture size of a split, and how many of the first ones are wanted."""

    order: Order
    samples: int
    wanted: int
    batch_size: int


def size_parts(reader: Reader, max_states: int, batch_size: int) -> Iterator[SizePart]:
    """The share of each size in `max_states` states; batches of the smallest size have `batch_size` rows."""
    pairs = [*map(len, reader.pairs_of_sizes)]
    wanted = SizeSchedule(pairs, [1] * len(pairs)).counts(min(max_states, reader.samples_per_epoch))
    pixels = [size.pixels if size else 1 for size in reader.sizes]
    for order, samples, count, of_size in zip(reader.orders, pairs, wanted, pixels, strict=True):
        if order is not None:
            yield SizePart(order, samples, min(count, samples), max(1, batch_size * min(pixels) // of_size))


def read_first_states(reader: Reader, max_states: int, batch_size: int = DEFAULT_BATCH_SIZE) -> Iterator[Batch]:
    """The first `max_states` states of a split, each once, or all of them; of each size its share."""
    for order, _, wanted, rows in size_parts(reader, max_states, batch_size):
        for first in range(0, wanted, rows):
            yield reader.gather(*order.at(np.arange(first, min(first + rows, wanted))))


class ValidationConfig(Strict):
    """The measurement of the averaged student at each checkpoint."""

    states: int = Field(
        160, ge=0, description="held-out states, and as many seen ones, as stored and under new noise; 0 for none"
    )


@dataclass(frozen=True)
class ValidationResult:
    """Relative errors of the student's velocities; None where the cache has no renoised states."""

    held_out: VelocityErrors
    seen: RelativeError | None
    """at cached states of seen prompts"""
    seen_new_noise: RelativeError | None
    """at the same prompts and times under new noise"""
    seconds: float

    @property
    def kind(self) -> str:
        """Kind of the journal's line."""
        return "validation"

    @property
    def score(self) -> float:
        """The best checkpoint has the least."""
        return self.held_out.velocity.overall

    def metrics(self) -> dict[str, Any]:
        """Content of the journal's line."""
        line: dict[str, Any] = {**_error_metrics("held_out", self.held_out.velocity)}
        line["held_out_guidance"] = self.held_out.guidance.overall
        if by_size := self.held_out.velocity_by_size:
            line["held_out_by_size"] = {str(size): error for size, error in by_size.items()}
        if self.seen and self.seen_new_noise:
            line |= {**_error_metrics("seen", self.seen), **_error_metrics("seen_new_noise", self.seen_new_noise)}
            line["cache_gap"] = self.seen_new_noise.overall - self.seen.overall
            line["cache_gap_by_s"] = [
                None if new is None or old is None else new - old
                for new, old in zip(self.seen_new_noise.by_bin, self.seen.by_bin, strict=True)
            ]
        return {**line, "seconds": self.seconds}


PicturesAndBatch = tuple[Float[Tensor, "b c h w"], Batch]
"""Finished pictures x0, and the rows of a batch that belong to them."""


class Validation:
    """Fixed states, made at the first use: the same for every checkpoint, and for every process that resumes a run.

    `held_out` reads the validation split, `seen` the training split; `teacher` predicts at the new states.
    """

    def __init__(self, config: ValidationConfig, held_out: Reader, seen: Reader, teacher: Teacher) -> None:
        self._states, self._readers, self._teacher = config.states, (held_out, seen), teacher

    @cached_property
    def _held_out(self) -> tuple[Batch, ...]:
        return tuple(read_first_states(self._readers[0], self._states, VALIDATION_BATCH_SIZE))

    @cached_property
    def _seen(self) -> tuple[PicturesAndBatch, ...]:
        return tuple(seen_states(self._readers[1], self._states))

    @cached_property
    def _renoised(self) -> tuple[Batch, ...]:
        return tuple(renoise(self._teacher, self._seen))

    def summary(self) -> str:
        """What will be measured, and what cannot be."""
        held_out, seen = (sum(map(len, batches)) for batches in (self._held_out, self._renoised))
        if not held_out:
            return "validation: no states (validation.states = 0)"
        text = "no seen ones: the cache holds no renoised state, so its gap is not measured"
        if seen:
            text = f"{seen} seen ones and their twins under new noise"
        return f"validation: {held_out} held-out states, {text}"

    def __call__(self, student: Student) -> ValidationResult | None:
        """Measure the averaged student, in eval mode; None without states."""
        if not self._held_out:
            return None
        start = time.perf_counter()
        held_out = velocity_errors(student, self._held_out, self._teacher.uncond)
        seen, renoised = (
            velocity_errors(student, batches, self._teacher.uncond).velocity if batches else None
            for batches in ([batch for _, batch in self._seen], self._renoised)
        )
        return ValidationResult(held_out, seen, renoised, time.perf_counter() - start)


def seen_states(reader: Reader, max_states: int) -> Iterator[PicturesAndBatch]:
    """The first states of a stream that are renoised pictures, of each size its share.

    States on guided trajectories are left out: they are not distributed like noised pictures, so a comparison with new
    noise would measure that difference too.
    """
    for part in size_parts(reader, max_states, VALIDATION_BATCH_SIZE):
        rows = _renoised_rows(reader, part)
        for first in range(0, len(rows), part.batch_size):
            records, state_indices = zip(*rows[first : first + part.batch_size], strict=True)
            yield torch.stack([record.x0 for record in records]), collate(records, state_indices)


def _renoised_rows(reader: Reader, part: SizePart) -> list[tuple[Record, int]]:
    """The first states of one size that are renoised pictures, as many as are wanted and there are."""
    rows: list[tuple[Record, int]] = []
    for first in range(0, part.samples if part.wanted else 0, part.batch_size):
        places = np.arange(first, min(first + part.batch_size, part.samples))
        for record_index, state_index in zip(*part.order.at(places), strict=True):
            record = reader.record_at(int(record_index))
            if not record.states.trajectory[int(state_index)]:
                rows.append((record, int(state_index)))
        if len(rows) >= part.wanted:
            break
    return rows[: part.wanted]


def renoise(teacher: Teacher, seen: Sequence[PicturesAndBatch]) -> Iterator[Batch]:
    """The same prompts and times under fresh noise, with the teacher's predictions there.

    As in the cache, x is rounded to half precision before the teacher's call, and its predictions after it.
    """
    uncond = teacher.uncond.half()
    for number, (x0, batch) in enumerate(seen):
        generator = torch.Generator().manual_seed(derived_seed("validation", 0, number))
        x = interpolate(x0.float(), torch.randn(x0.shape, generator=generator), batch.s).half()
        moved = replace(batch, x_s=x).to(uncond.device, torch.float32)
        output = teacher.predict(moved.x_s, moved.s, moved.k, moved.cond.half(), uncond)
        yield replace(batch, x_s=x, v_cond=output.v_cond.half().cpu(), v_uncond=output.v_uncond.half().cpu())


def _error_metrics(name: str, error: RelativeError) -> dict[str, Any]:
    return {name: error.overall, f"{name}_by_s": list(error.by_bin)}
