"""Laws of forecasts: from few measured steps, right for a steady pace, and mended when they were wrong by half."""

import pytest

from stages.system.forecast import MEASURED_STEPS, Forecast, duration


class Work:
    """Work with a clock of its own."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.now, self.done, self.lines = 0.0, done, []
        self.forecast = Forecast("train", "samples", total, self.lines.append, done, lambda: self.now)

    def step(self, units: int, seconds: float, times: int = 1) -> None:
        for _ in range(times):
            self.now += seconds
            self.done += units
            self.forecast.progress(self.done)


def test_a_steady_pace_is_forecast_once_from_a_few_steps_and_a_slow_first_one_does_not_count():
    work = Work(1000)
    work.step(10, 30.0)
    work.step(10, 1.0, MEASURED_STEPS - 1)
    assert work.lines == []
    work.step(10, 1.0, 98)
    assert work.lines == ["train: about 1 min 37 s for 970 more samples, at 10 a second"]
    assert work.done == 1000


def test_long_steps_are_not_waited_for():
    work = Work(100)
    work.step(1, 60.0, 2)
    assert work.lines == ["train: about 1 h 38 min for 98 more samples, at 0.0167 a second"]


@pytest.mark.parametrize(("later", "lines"), [(1.0, 1), (1.3, 1), (2.0, 2), (0.8, 1), (0.5, 2)])
def test_it_is_printed_again_only_when_it_was_wrong_by_half(later, lines):
    work = Work(1000)
    work.step(1, 1.0, 10)
    work.step(1, later, 990)
    assert len(work.lines) == lines


def test_unexpected_pauses_are_counted():
    work = Work(100)
    work.step(1, 1.0, 20)
    work.now += 200.0
    work.step(1, 1.0)
    assert len(work.lines) == 2
    assert "in all, not 1 min 40 s" in work.lines[1]


def test_what_was_there_already_takes_no_time():
    work = Work(1000, done=900)
    work.step(10, 1.0, 1 + MEASURED_STEPS)
    assert work.lines == ["train: about 7 s for 70 more samples, at 10 a second"]


def test_steps_of_milliseconds_are_measured_for_a_second():
    work = Work(10_000)
    work.step(1, 0.002, 400)
    assert work.lines == []
    work.step(1, 0.002, 400)
    assert len(work.lines) == 1


def test_no_progress_is_no_step():
    work = Work(100)
    work.step(1, 1.0)
    work.step(0, 1.0, 50)
    assert work.lines == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_are_words(seconds, text):
    assert duration(seconds) == text
