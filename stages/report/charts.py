"""Line charts as geometry in the units of an SVG: scales, ticks and paths; the template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

WIDTH, HEIGHT = 520.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 12.0, 46.0
MAX_POINTS = 240
"""Points of a line; of more, neighbours are averaged."""
MAX_TABLE_ROWS = 40
LOG_RATIO = 20.0
"""A chart whose largest value is so many times its smallest is logarithmic."""
MAX_DECADES = 6
"""Powers of ten that have a tick."""
LEAST, MOST = 1e-100, 1e100
"""Sizes of a number that is drawn: squares, sums and shares of such numbers are numbers too."""
COLOURS, DASHES = 10, ("", "7 4", "2 3")

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line; a value of None is a gap."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    """x, lower and upper end of an interval."""
    is_faint: bool = False

    @property
    def drawable(self) -> "Series":
        """The same of numbers that can be drawn."""
        ends = [(x, drawable(low), drawable(high)) for x, low, high in self.band]
        band = [(x, low, high) for x, low, high in ends if low is not None and high is not None]
        return replace(self, points=[(x, drawable(y)) for x, y in self.points], band=band)


@dataclass(frozen=True)
class Chart:
    """Lines over one axis."""

    key: str
    """Its id in the page."""
    title: str
    x_label: str
    y_label: str
    text: str
    """What it shows and how to read it, in a sentence or two."""
    series: Sequence[Series] = field(default=())
    may_be_logarithmic: bool = True
    x_limits: tuple[float, float] | None = None
    """The ends of the axis, where they are not those of the values."""

    @cached_property
    def lines(self) -> list[Series]:
        """The series with few enough points, without those that have none; what cannot be drawn is a gap."""
        drawn = [one.drawable for one in self.series]
        thinned = [Series(one.name, thin(one.points), one.band, one.is_faint) for one in drawn]
        return [one for one in thinned if any(y is not None for _, y in one.points)]

    @cached_property
    def _values(self) -> list[float]:
        ends = [end for one in self.lines for _, low, high in one.band for end in (low, high)]
        return [y for one in self.lines for _, y in one.points if y is not None] + ends

    @cached_property
    def is_logarithmic(self) -> bool:
        """Whether equal heights are equal factors."""
        low, high = min(self._values), max(self._values)
        return self.may_be_logarithmic and low > 0 and high / low >= LOG_RATIO

    @cached_property
    def x_range(self) -> tuple[float, float]:
        """The ends of the axis: the least and the greatest x."""
        if self.x_limits:
            return self.x_limits
        xs = [x for one in self.lines for x, _ in one.points]
        low, high = min(xs), max(xs)
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    @cached_property
    def y_ticks(self) -> list[float]:
        """Round values that hold all others between the first and the last."""
        low, high = min(self._values), max(self._values)
        if self.is_logarithmic:
            return _log_ticks(low, high)
        return linear_ticks(min(low, 0.0), max(high, 0.0), 5, outside=True)

    @cached_property
    def x_ticks(self) -> list[float]:
        """Round values within the range."""
        return linear_ticks(*self.x_range, 5, outside=False)

    def x(self, value: float) -> float:
        """Where a value is across."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Where a value is from the top."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.is_logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, one: Series) -> str:
        """The line, broken where a value is missing."""
        parts, pen = [], "M"
        for x, y in one.points:
            if y is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        return "".join(parts)

    def band_path(self, one: Series) -> str:
        """The outline of the interval; empty without one."""
        upper = [f"{self.x(x):.1f} {self.y(high):.1f}" for x, _, high in one.band]
        lower = [f"{self.x(x):.1f} {self.y(low):.1f}" for x, low, _ in reversed(one.band)]
        return f"M{'L'.join([*upper, *lower])}Z" if one.band else ""

    def dots(self, one: Series) -> list[tuple[str, str]]:
        """Marks of the points where they are few."""
        shown = [(x, y) for x, y in one.points if y is not None]
        return [(f"{self.x(x):.1f}", f"{self.y(y):.1f}") for x, y in shown] if len(shown) <= 24 else []

    def for_script(self) -> dict[str, Any]:
        """What the reading of values under the pointer needs."""
        return {
            "xs": sorted({x for one in self.lines for x, _ in one.points}),
            "range": self.x_range,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "width": WIDTH,
            "label": self.x_label,
            "series": [{"name": one.name, "points": list(one.points)} for one in self.lines],
        }

    def table(self) -> list[tuple[str, list[str]]]:
        """The values as text: x, and one cell for each line."""
        columns = [dict(one.points) for one in self.lines]
        xs = sorted({x for column in columns for x in column})
        step = max(1, math.ceil(len(xs) / MAX_TABLE_ROWS))
        shown = sorted({*xs[::step], *xs[-1:]})
        return [(short(x), [short(column.get(x)) for column in columns]) for x in shown]


def drawable(value: float | None) -> float | None:
    """A number between the sizes that can be drawn, 0 below them; None above them and for what is no number."""
    if value is None or not abs(value) <= MOST:  # nan is not
        return None
    return value if abs(value) >= LEAST else 0.0


def colour(number: int) -> int:
    """The colour of line `number`; when all are taken they come again with other dashes."""
    return number % COLOURS


def dash(number: int) -> str:
    """The dashes of line `number`."""
    return DASHES[number // COLOURS % len(DASHES)]


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most so many points, each the mean of its neighbours; the last stays as it is."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most - 1))
    groups = [points[first : first + size] for first in range(0, len(points) - 1, size)]
    means = []
    for group in groups:
        values = [y for _, y in group if y is not None]
        means.append((group[-1][0], sum(values) / len(values) if values else None))
    return [*means[:-1], points[-1]] if means[-1][0] == points[-1][0] else [*means, points[-1]]


def linear_ticks(low: float, high: float, count: int, outside: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten: within the range, or also the next outside it."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = low / step, high / step
    ends = (
        (math.floor(first + 1e-9), math.ceil(last - 1e-9)) if outside else (math.ceil(first - 1e-9), math.floor(last))
    )
    return [number * step for number in range(int(ends[0]), int(ends[1]) + 1)] or [low, high]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the range; powers alone, or some of them, for a long one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / MAX_DECADES)
    steps = (1,) if last - first > 3 else (1, 2, 5)
    ticks = [m * 10.0**power for power in range(first, last + every, every) for m in steps]
    start = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    end = next((i for i, tick in enumerate(ticks) if tick >= high), len(ticks) - 1)
    return ticks[start : end + 1]


def short(value: float | None) -> str:
    """A number of three digits, thousands apart; a dash for none and for one that is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
