"""The measurement of a student of few steps on held-out records: single landings, and the end of all its steps."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from configs.values import PictureSize
from shards.batch import Batch
from shards.reader import Reader
from stages.evaluate.paired import relative_errors
from stages.fast.rows import RowShares, landing_ends, window_batch
from stages.flow.solver import euler
from stages.flow.windows import window_ends, window_of
from stages.nets.student import Student
from stages.sampling.fields import student_field
from stages.train.validation import VALIDATION_BATCH_SIZE, read_first_states


@dataclass(frozen=True)
class WindowResult:
    """Errors of a student of few steps on records that no training saw."""

    landing: float
    """sum |u - u*|^2 / sum |u*|^2 over all states whose landing is known"""
    landing_by_s: tuple[float | None, ...]
    """that of each window, that of the data first; None for one without a state"""
    end: float | None
    """paired error of all steps from the stored noise, at the record's own guidance scale: `relative_errors`; None
    where the cache has no landings, of which the noise is one"""
    seconds: float

    @property
    def kind(self) -> str:
        """Kind of the journal's line."""
        return "validation"

    @property
    def score(self) -> float:
        """The best checkpoint has the least."""
        return self.landing if self.end is None else self.end

    def metrics(self) -> dict[str, Any]:
        """Content of the journal's line."""
        by_s = list(self.landing_by_s)
        end = {} if self.end is None else {"end": self.end}
        return {"landing": self.landing, "landing_by_s": by_s, **end, "seconds": self.seconds}


@dataclass(frozen=True)
class Ends:
    """Where trajectories of pictures of one size begin and end."""

    noise: Float[Tensor, "b c h w"]
    x0: Float[Tensor, "b c h w"]
    cond: Float[Tensor, "b l d"]
    guidance_scale: Float[Tensor, " b"]


class WindowValidation:
    """Fixed held-out states, the same for every checkpoint, and for every process that resumes a run."""

    def __init__(self, held_out: Reader, windows: int, states: int, shares: RowShares, device: torch.device) -> None:
        """`shares` are those of the training, so that its states are distributed like those."""
        self._reader, self._windows, self._states = held_out, windows, states
        self._shares, self._device = shares, device

    @cached_property
    def _stored(self) -> tuple[Batch, ...]:
        return tuple(read_first_states(self._reader, self._states, VALIDATION_BATCH_SIZE))

    @cached_property
    def _rows(self) -> tuple[Batch, ...]:
        """The states with the velocities that land, chosen as in training."""
        numbers, rows = count(), []
        for batch in self._stored:
            samples = torch.tensor([next(numbers) for _ in range(len(batch))])
            rows.append(window_batch(batch, samples, self._windows, self._shares, 0))
        return tuple(rows)

    @cached_property
    def _ends(self) -> tuple[Ends, ...]:
        """Each record of the states once, those of one size together."""
        return tuple(_distinct_ends(self._stored))

    def summary(self) -> str:
        """What will be measured."""
        if not (states := sum(map(len, self._stored))):
            return "validation: no states (fast.validation_states = 0)"
        return f"validation: {states} held-out states, {sum(len(ends.x0) for ends in self._ends)} trajectories"

    @torch.no_grad()
    def __call__(self, student: Student) -> WindowResult | None:
        """Measure the averaged student, in eval mode; None without states."""
        if not self._stored:
            return None
        start, ends = time.perf_counter(), window_ends(self._windows)
        error, target = torch.zeros(2, self._windows, dtype=torch.float64)
        for batch in self._rows:
            lands = batch.trajectory
            assert lands is not None
            window = window_of(batch.s, ends)[lands]
            there = batch.to(self._device, torch.float32)
            u = student.velocity(there.x_s, there.s, there.cond, there.guidance_scale).cpu()[lands]
            landing = batch.v_cond[lands]
            error.index_add_(0, window, (u - landing).square().flatten(1).sum(1, dtype=torch.float64))
            target.index_add_(0, window, landing.square().flatten(1).sum(1, dtype=torch.float64))
        by_window = [float(e / t) if t > 0 else None for e, t in zip(error, target, strict=True)]
        end_errors = [self._end_errors(student, of_size) for of_size in self._ends]
        end = float(torch.cat(end_errors).mean()) if end_errors else None
        seconds = time.perf_counter() - start
        overall, by_s = float(error.sum() / target.sum()), tuple(reversed(by_window))
        return WindowResult(overall, by_s, end, seconds)

    def _end_errors(self, student: Student, ends: Ends) -> Float[Tensor, " b"]:
        """The error of each picture."""
        field, uncond = student_field(student, windows=self._windows), torch.empty(0)
        noise, cond, w = (part.to(self._device) for part in (ends.noise, ends.cond.float(), ends.guidance_scale))
        x0 = [
            euler(
                lambda x, s, rows=rows: field.velocity(x, s, cond[rows], uncond, w[rows]),  # type: ignore[misc]
                noise[rows],
                window_ends(self._windows),
            )
            for rows in torch.arange(len(noise)).split(VALIDATION_BATCH_SIZE)
        ]
        return relative_errors(torch.cat(x0).cpu(), ends.x0)


def _distinct_ends(batches: Sequence[Batch]) -> Iterator[Ends]:
    """Each record of the batches once, those of one size together."""
    seen: set[str] = set()
    by_size: dict[PictureSize | None, list[Ends]] = {}
    for batch in batches:
        assert batch.guidance_scale is not None
        if (known := landing_ends(batch)) is None:
            continue
        noise, x0 = known
        for row, key in enumerate(batch.keys):
            if key not in seen:
                one = slice(row, row + 1)
                ends = Ends(noise[one], x0[one], batch.cond[one], batch.guidance_scale[one])
                by_size.setdefault(batch.size, []).append(ends)
                seen.add(key)
    for parts in by_size.values():
        yield Ends(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
