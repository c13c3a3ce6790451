"""Forecasts of how long some work takes: from its first measured steps, and again when that was wrong by half."""

import time
from collections.abc import Callable

MEASURED_STEPS, MIN_SECONDS, MAX_SECONDS = 2, 1.0, 20.0
"""A forecast is made after so many steps that took `MIN_SECONDS` in all, or after `MAX_SECONDS`."""
REVISION_RATIO = 1.5
MIN_REVISION_SECONDS = 5.0


class Forecast:
    """Prints how long some units of work (samples, prompts) take, timed from its construction.

    The first step is not measured: it waits for compilers, caches and other processes. Pauses count, so that later
    costs, such as those of checkpoints, lead to a second line.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int,
        print_line: Callable[[str], object],
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` names the work; `done` of `total` units are done already; `clock` counts seconds."""
        self._what, self._unit, self._total, self._print_line, self._clock = what, unit, total, print_line, clock
        self._start, self._done = clock(), done
        self._first_step: tuple[float, int] | None = None
        self._steps = 0
        self._forecast_seconds: float | None = None
        self._forecast_at = self._start

    def progress(self, done: int) -> None:
        """Called after each step with the number of units done so far."""
        if done <= self._done:
            return
        now, self._done = self._clock(), done
        if self._first_step is None:
            self._first_step = now, done
            return
        self._steps += 1
        seconds = now - self._first_step[0]
        rate = (done - self._first_step[1]) / max(seconds, 1e-9)
        left = max(0, self._total - done) / rate
        whole = now - self._start + left
        if self._forecast_seconds is None:
            if seconds < (MIN_SECONDS if self._steps >= MEASURED_STEPS else MAX_SECONDS):
                return
            revision = ""
        else:
            measured_before = max(self._forecast_at - self._start, MIN_REVISION_SECONDS)
            is_right = 1 / REVISION_RATIO <= whole / self._forecast_seconds <= REVISION_RATIO
            if is_right or now - self._forecast_at < measured_before:
                return
            revision = f" {duration(whole)} in all, not {duration(self._forecast_seconds)}:"
        self._forecast_seconds, self._forecast_at = whole, now
        amount = f"{max(0, self._total - done):,} more {self._unit}, at {rate:.3g} a second"
        self._print_line(f"{self._what}:{revision} about {duration(left)} for {amount}")


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
