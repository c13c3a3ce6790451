"""How long a piece of work takes: said from its first measured steps, and again when that was wrong by half."""

import time
from collections.abc import Callable

MEASURED_STEPS, SHORTEST_SECONDS, LONGEST_SECONDS = 2, 1.0, 20.0
"""A forecast is made after so many steps that took some time, or where these are long after so much time."""
REVISION_RATIO = 1.5
LEAST_SECONDS = 5.0
"""What is over sooner is not worth a second line."""


class Forecast:
    """Says how long some units of work (samples, prompts) take, counted from its own making.

    The first step is not measured: it waits for compilers, caches and other processes. Pauses count, as the whole is
    timed from its beginning; so what is only found out later, such as the cost of checkpoints, leads to a second line.
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
        """`what` names the work; `done` of `total` units are there already. `clock` counts seconds."""
        self._what, self._unit, self._total, self._print_line, self._clock = what, unit, total, print_line, clock
        self._begun, self._done = clock(), done
        self._first_step: tuple[float, int] | None = None
        self._steps = 0
        self._forecast_seconds: float | None = None
        self._forecast_at = self._begun

    def progress(self, done: int) -> None:
        """Units that are there now; called after each step."""
        if done <= self._done:
            return
        now, self._done = self._clock(), done
        if self._first_step is None:
            self._first_step = now, done
            return
        self._steps += 1
        seconds = now - self._first_step[0]
        left = max(0, self._total - done) * seconds / (done - self._first_step[1])
        whole = now - self._begun + left
        if self._forecast_seconds is None:
            if seconds >= (SHORTEST_SECONDS if self._steps >= MEASURED_STEPS else LONGEST_SECONDS):
                self._announce(now, whole, f"{self._what}: about {duration(left)} for {self._amount(done)}")
        elif self._can_revise(now) and not 1 / REVISION_RATIO <= whole / self._forecast_seconds <= REVISION_RATIO:
            earlier = duration(self._forecast_seconds)
            text = f"{self._what}: {duration(whole)} in all, not {earlier}: about {duration(left)} for"
            self._announce(now, whole, f"{text} {self._amount(done)}")

    def _can_revise(self, now: float) -> bool:
        """Whether as much was measured since the last forecast as went into it."""
        return now - self._forecast_at >= max(self._forecast_at - self._begun, LEAST_SECONDS)

    def _announce(self, now: float, whole: float, text: str) -> None:
        self._forecast_seconds, self._forecast_at = whole, now
        self._print_line(text)

    def _amount(self, done: int) -> str:
        assert self._first_step is not None
        rate = (done - self._first_step[1]) / max(self._clock() - self._first_step[0], 1e-9)
        return f"{max(0, self._total - done):,} more {self._unit}, at {rate:.3g} a second"


def duration(seconds: float) -> str:
    """Seconds in words, to two figures: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
