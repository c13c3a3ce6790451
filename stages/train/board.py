"""The board of a run in a terminal: how far it is, what it loses where, what was validated, and what is wrong."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,:-=+#"
REFRESH_SECONDS = 2.0
TREND, WARNINGS = 48, 3
FORMATS = ("{:.4g}", "{:.3f}", "{:.1e}")
"""Of a block's error, lambda and update ratio."""
BY_S = {"flow_by_s": "flow", "guidance_by_s": "guidance", "blocks_by_s": "blocks"}
VALIDATED = {"held_out": "held out", "seen": "seen", "seen_new_noise": "seen, new noise"}


class Clock:
    """How long the rest takes, at the pace since this process began, its checkpoints and grids included."""

    def __init__(self, samples: int, max_samples: int) -> None:
        self.max_samples, self._first, self._since = max_samples, samples, time.monotonic()

    def left(self, samples: int) -> str:
        """As h:mm:ss; a question mark before the first step."""
        pace = (samples - self._first) / max(time.monotonic() - self._since, 1e-9)
        return str(timedelta(seconds=round(max(0, self.max_samples - samples) / pace))) if pace > 0 else "?"


def share(line: Mapping[str, Any], name: str) -> str:
    """Seconds of the window as a share of its length."""
    return f"{100 * line[name] / line['window_seconds']:.1f}%"


def counted(line: Mapping[str, Any]) -> dict[str, int]:
    """The steps of the run that were skipped and the losses that were spikes, where there are any."""
    return {name: line[name] for name in ("skipped", "spikes") if line.get(name)}


class Board:
    """The whole run at a glance, drawn anew every other second."""

    def __init__(self, title: str, samples: int, max_samples: int, console: Console) -> None:
        self.title, self.samples, self._clock = title, samples, Clock(samples, max_samples)
        self._bars = ASCII_BARS if console.options.ascii_only else BARS
        self._line: Mapping[str, Any] = {}
        self._validated: tuple[int, Mapping[str, Any]] | None = None
        self._examined: tuple[int, Mapping[str, Any]] | None = None
        self._trend: deque[float] = deque(maxlen=TREND)
        self._present: Sequence[str] = ()
        self._past: deque[str] = deque(maxlen=WARNINGS)
        # Drawn between two steps, so that no second thread competes with them.
        self._live = Live(self.drawn(), console=console, auto_refresh=False)
        self._live.start()
        self._drawn_at = time.monotonic()

    def progress(self, samples: int) -> None:
        """Move the bar, where it was not drawn a moment ago."""
        self.samples = samples
        if time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
            self._draw()

    def line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """Take over the newest means."""
        self._line, self._present = line, tuple(warnings)
        self._trend.append(line["flow"])
        self._draw()

    def note(self, samples: int, kind: str, found: Mapping[str, Any]) -> None:
        """Keep the last validation and the last exam of classes; anything else is a warning."""
        if kind == "validation":
            self._validated = samples, found
            self._draw()
        elif kind == "classes":
            self._examined = samples, found
            self._draw()
        else:
            self.warn(samples, f"{kind}: {found}")

    def warn(self, samples: int, text: str) -> None:
        """Keep the last few."""
        self._past.append(f"after {samples}: {text}")
        self._draw()

    def say(self, text: str) -> None:
        """Print a line above the board, where it stays."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._draw()
        self._live.stop()

    def drawn(self) -> RenderableType:
        """Everything, in one panel."""
        parts: list[RenderableType] = [self._head()]
        if self._line:
            columns = Table.grid(padding=(0, 4))
            columns.add_row(_blocks(self._line), _by_s(self._line, self._bars))
            parts += [Text(""), self._figures(), Text(""), columns]
        if self._validated:
            parts += [Text(""), _validation(*self._validated, self._bars)]
        if self._line.get("flow_by_class") or self._examined:
            parts += [Text(""), _classes(self._line.get("flow_by_class", {}), self._examined)]
        if self._present or self._past:
            parts += [Text(""), *(Text(f"! {text}", style="yellow") for text in (*self._present, *self._past))]
        return Panel(Group(*parts), title=escape(self.title), title_align="left", border_style="dim", padding=(0, 1))

    def _draw(self) -> None:
        self._live.update(self.drawn(), refresh=True)
        self._drawn_at = time.monotonic()

    def _head(self) -> Table:
        of, samples = self._clock.max_samples, self.samples
        rate = f"{self._line['samples_per_second']:.1f} samples/s, " if self._line else ""
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=of, completed=samples, width=32)
        head.add_row(bar, f"{samples:,} of {of:,} samples", f"{rate}{self._clock.left(samples)} left")
        return head

    def _figures(self) -> Table:
        line = self._line
        figures = Table.grid(padding=(0, 3))
        named = {name: f"{line[name]:.4g}" for name in ("loss", "flow", "guidance", "block_term", "grad_norm")}
        figures.add_row(*(_named(name.replace("_", " "), value) for name, value in named.items()))
        figures.add_row(
            _named("rate", f"{line['learning_rate']:.2e}"),
            _named("data wait", share(line, "data_wait_seconds")),
            _named("bookkeeping", share(line, "bookkeeping_seconds")),
            _named("effective", f"{100 * line['effective_size']:.0f} %"),
            _named("memory", f"{line['memory_gib']:.2f} GiB"),
        )
        figures.add_row(_named("flow so far", ""), Text(sparkline(list(self._trend), self._bars), style="cyan"))
        if went_wrong := counted(line):
            figures.add_row(*(Text(f"{name} {count}", style="yellow") for name, count in went_wrong.items()))
        return figures


def sparkline(values: Sequence[float | None], bars: str = BARS) -> str:
    """One character a value, its height over that of the largest; a blank where there is none."""
    highest = max((value for value in values if value is not None), default=0.0)
    if not highest > 0:
        return "".join(" " if value is None else bars[0] for value in values)
    top = len(bars) - 1
    return "".join(" " if value is None else bars[max(0, min(top, round(top * value / highest)))] for value in values)


def _blocks(line: Mapping[str, Any]) -> Table:
    """A row for each block: its error, its lambda, and how far a step moves its weights."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("block")
    for head in ("error", "lambda", "update"):
        table.add_column(head, justify="right")
    updates = line.get("update_ratio", {})
    for block in dict.fromkeys((*line["blocks"], *updates)):
        found = (line["blocks"].get(block), line["lambdas"].get(block), updates.get(block))
        cells = ("" if value is None else text.format(value) for value, text in zip(found, FORMATS, strict=True))
        table.add_row(block, *cells)
    return table


def _by_s(line: Mapping[str, Any], bars: str) -> Table:
    """A sparkline for each part of the loss, s rising to the right, and the largest value of each."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("error by s")
    table.add_column("0 .. 1")
    table.add_column("largest", justify="right")
    for key, name in BY_S.items():
        values = line[key]
        largest = max((value for value in values if value is not None), default=0.0)
        table.add_row(name, Text(sparkline(values, bars), style="cyan"), f"{largest:.4g}")
    return table


def _validation(samples: int, found: Mapping[str, Any], bars: str) -> Table:
    """A row for each set of states, and what noise makes of the seen ones."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"validation after {samples:,}")
    table.add_column("error", justify="right")
    table.add_column("s 0 .. 1")
    for key, name in VALIDATED.items():
        if key in found:
            by_s = sparkline(found[f"{key}_by_s"], bars)
            table.add_row(name, f"{found[key]:.4f}", Text(by_s, style="cyan"))
    if "cache_gap" in found:
        table.add_row("cache gap", f"{found['cache_gap']:+.4f}")
    return table


def _classes(flow: Mapping[str, float | None], examined: tuple[int, Mapping[str, Any]] | None) -> Table:
    """A row for each class: its flow error now, and what the last exam found of it."""
    samples, found = examined or (0, {})
    measured = {name: values for name, values in found.items() if isinstance(values, Mapping)}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("class")
    table.add_column("flow", justify="right")
    for name in measured:
        table.add_column(f"{name.replace('_', ' ')} after {samples:,}", justify="right")
    for one in dict.fromkeys((*flow, *(key for values in measured.values() for key in values))):
        cells = (values.get(one) for values in (flow, *measured.values()))
        table.add_row(escape(one), *("" if value is None else f"{value:.4g}" for value in cells))
    return table


def _named(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), value)
