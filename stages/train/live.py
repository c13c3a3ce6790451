"""The board of a run in a terminal: how far it is, what it loses where, what was validated, and what is wrong.

A run as one watches it: a board in a terminal, one line a time in a log, nothing on other processes.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stages.system.terminal import console as console_of

SPARKLINE_BARS, ASCII_SPARKLINE_BARS = "▁▂▃▄▅▆▇█", "_.,:-=+#"
REFRESH_SECONDS = 2.0
TREND_LENGTH, MAX_WARNINGS = 48, 3
BLOCK_FORMATS = ("{:.4g}", "{:.3f}", "{:.1e}")
"""Of a block's error, lambda and update ratio."""
BY_S_LABELS = {"flow_by_s": "flow", "guidance_by_s": "guidance", "blocks_by_s": "blocks"}
VALIDATION_LABELS = {"held_out": "held out", "seen": "seen", "seen_new_noise": "seen, new noise"}


class RemainingTime:
    """How long the rest takes, at the pace since this process began, its checkpoints and grids included."""

    def __init__(self, samples: int, max_samples: int) -> None:
        self.max_samples, self._start_samples, self._start_time = max_samples, samples, time.monotonic()

    def format(self, samples: int) -> str:
        """As h:mm:ss; a question mark before the first step."""
        pace = (samples - self._start_samples) / max(time.monotonic() - self._start_time, 1e-9)
        return str(timedelta(seconds=round(max(0, self.max_samples - samples) / pace))) if pace > 0 else "?"


def window_share(line: Mapping[str, Any], name: str) -> str:
    """Seconds of the window as a share of its length."""
    return f"{100 * line[name] / line['window_seconds']:.1f}%"


def anomaly_counts(line: Mapping[str, Any]) -> dict[str, int]:
    """The steps of the run that were skipped and the losses that were spikes, where there are any."""
    return {name: line[name] for name in ("skipped", "spikes") if line.get(name)}


class Dashboard:
    """The whole run at a glance, drawn anew every other second."""

    def __init__(self, title: str, samples: int, max_samples: int, console: Console) -> None:
        self.title, self.samples, self._remaining_time = title, samples, RemainingTime(samples, max_samples)
        self._bars = ASCII_SPARKLINE_BARS if console.options.ascii_only else SPARKLINE_BARS
        self._latest_line: Mapping[str, Any] = {}
        self._last_validation: tuple[int, Mapping[str, Any]] | None = None
        self._last_exam: tuple[int, Mapping[str, Any]] | None = None
        self._trend: deque[float] = deque(maxlen=TREND_LENGTH)
        self._current_warnings: Sequence[str] = ()
        self._past_warnings: deque[str] = deque(maxlen=MAX_WARNINGS)
        # Drawn between two steps, so that no second thread competes with them.
        self._live = Live(self.render(), console=console, auto_refresh=False)
        self._live.start()
        self._refreshed_at = time.monotonic()

    def show_progress(self, samples: int) -> None:
        """Move the bar, where it was not drawn a moment ago."""
        self.samples = samples
        if time.monotonic() - self._refreshed_at >= REFRESH_SECONDS:
            self._refresh()

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """Take over the newest means."""
        self._latest_line, self._current_warnings = line, tuple(warnings)
        self._trend.append(line["flow"])
        self._refresh()

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Keep the last validation and the last exam of classes; anything else is a warning."""
        if kind == "validation":
            self._last_validation = samples, metrics
            self._refresh()
        elif kind == "classes":
            self._last_exam = samples, metrics
            self._refresh()
        else:
            self.show_warning(samples, f"{kind}: {metrics}")

    def show_warning(self, samples: int, text: str) -> None:
        """Keep the last few."""
        self._past_warnings.append(f"after {samples}: {text}")
        self._refresh()

    def print_line(self, text: str) -> None:
        """Print a line above the board, where it stays."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._refresh()
        self._live.stop()

    def render(self) -> RenderableType:
        """Everything, in one panel."""
        parts: list[RenderableType] = [self._header()]
        if self._latest_line:
            columns = Table.grid(padding=(0, 4))
            columns.add_row(_blocks_table(self._latest_line), _by_s_table(self._latest_line, self._bars))
            parts += [Text(""), self._metrics_table(), Text(""), columns]
        if self._last_validation:
            parts += [Text(""), _validation_table(*self._last_validation, self._bars)]
        if self._latest_line.get("flow_by_class") or self._last_exam:
            parts += [Text(""), _classes_table(self._latest_line.get("flow_by_class", {}), self._last_exam)]
        if self._current_warnings or self._past_warnings:
            parts += [
                Text(""),
                *(Text(f"! {text}", style="yellow") for text in (*self._current_warnings, *self._past_warnings)),
            ]
        return Panel(Group(*parts), title=escape(self.title), title_align="left", border_style="dim", padding=(0, 1))

    def _refresh(self) -> None:
        self._live.update(self.render(), refresh=True)
        self._refreshed_at = time.monotonic()

    def _header(self) -> Table:
        of, samples = self._remaining_time.max_samples, self.samples
        rate = f"{self._latest_line['samples_per_second']:.1f} samples/s, " if self._latest_line else ""
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=of, completed=samples, width=32)
        head.add_row(bar, f"{samples:,} of {of:,} samples", f"{rate}{self._remaining_time.format(samples)} left")
        return head

    def _metrics_table(self) -> Table:
        line = self._latest_line
        figures = Table.grid(padding=(0, 3))
        named = {name: f"{line[name]:.4g}" for name in ("loss", "flow", "guidance", "block_term", "grad_norm")}
        figures.add_row(*(_label_value(name.replace("_", " "), value) for name, value in named.items()))
        figures.add_row(
            _label_value("rate", f"{line['learning_rate']:.2e}"),
            _label_value("data wait", window_share(line, "data_wait_seconds")),
            _label_value("bookkeeping", window_share(line, "bookkeeping_seconds")),
            _label_value("effective", f"{100 * line['effective_size']:.0f} %"),
            _label_value("memory", f"{line['memory_gib']:.2f} GiB"),
        )
        figures.add_row(_label_value("flow so far", ""), Text(sparkline(list(self._trend), self._bars), style="cyan"))
        if went_wrong := anomaly_counts(line):
            figures.add_row(*(Text(f"{name} {count}", style="yellow") for name, count in went_wrong.items()))
        return figures


def sparkline(values: Sequence[float | None], bars: str = SPARKLINE_BARS) -> str:
    """One character a value, its height over that of the largest; a blank where there is none."""
    highest = max((value for value in values if value is not None), default=0.0)
    if not highest > 0:
        return "".join(" " if value is None else bars[0] for value in values)
    top = len(bars) - 1
    return "".join(" " if value is None else bars[max(0, min(top, round(top * value / highest)))] for value in values)


def _blocks_table(line: Mapping[str, Any]) -> Table:
    """A row for each block: its error, its lambda, and how far a step moves its weights."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("block")
    for head in ("error", "lambda", "update"):
        table.add_column(head, justify="right")
    updates = line.get("update_ratio", {})
    for block in dict.fromkeys((*line["blocks"], *updates)):
        found = (line["blocks"].get(block), line["lambdas"].get(block), updates.get(block))
        cells = ("" if value is None else text.format(value) for value, text in zip(found, BLOCK_FORMATS, strict=True))
        table.add_row(block, *cells)
    return table


def _by_s_table(line: Mapping[str, Any], bars: str) -> Table:
    """A sparkline for each part of the loss, s rising to the right, and the largest value of each."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("error by s")
    table.add_column("0 .. 1")
    table.add_column("largest", justify="right")
    for key, name in BY_S_LABELS.items():
        values = line[key]
        largest = max((value for value in values if value is not None), default=0.0)
        table.add_row(name, Text(sparkline(values, bars), style="cyan"), f"{largest:.4g}")
    return table


def _validation_table(samples: int, metrics: Mapping[str, Any], bars: str) -> Table:
    """A row for each set of states, and what noise makes of the seen ones."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"validation after {samples:,}")
    table.add_column("error", justify="right")
    table.add_column("s 0 .. 1")
    for key, name in VALIDATION_LABELS.items():
        if key in metrics:
            by_s = sparkline(metrics[f"{key}_by_s"], bars)
            table.add_row(name, f"{metrics[key]:.4f}", Text(by_s, style="cyan"))
    if "cache_gap" in metrics:
        table.add_row("cache gap", f"{metrics['cache_gap']:+.4f}")
    return table


def _classes_table(flow: Mapping[str, float | None], exam: tuple[int, Mapping[str, Any]] | None) -> Table:
    """A row for each class: its flow error now, and what the last exam found of it."""
    samples, found = exam or (0, {})
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


def _label_value(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), value)


class RunDisplay(Protocol):
    """What the journal shows; `line` and `found` are what it writes."""

    def show_progress(self, samples: int) -> None:
        """So many samples are seen."""
        ...

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """The means of a window, and what is wrong at present."""
        ...

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Something else was found."""
        ...

    def show_warning(self, samples: int, text: str) -> None:
        """Something went wrong once."""
        ...

    def print_line(self, text: str) -> None:
        """A line that stands by itself."""
        ...

    def close(self) -> None:
        """The run is over, or left."""
        ...


class SilentDisplay:
    """Shows nothing."""

    def show_progress(self, samples: int) -> None:
        """Nothing."""

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """Nothing."""

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def show_warning(self, samples: int, text: str) -> None:
        """Nothing."""

    def print_line(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LogDisplay:
    """One line for each line of the journal: a word, then name=value."""

    def __init__(self, samples: int, max_samples: int, console: Console) -> None:
        self._remaining_time, self._console = RemainingTime(samples, max_samples), console

    def show_progress(self, samples: int) -> None:
        """A log is not told of single steps."""

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """`train samples=640 of=44800 loss=... left=0:05:12`, and a warning line for each trouble."""
        samples = line["samples"]
        told = [f"samples={samples} of={self._remaining_time.max_samples}"]
        told += [f"{name}={line[name]:.4g}" for name in ("loss", "flow", "guidance", "block_term", "grad_norm")]
        told += [f"lr={line['learning_rate']:.3g} rate={line['samples_per_second']:.1f}/s"]
        told += [f"wait={window_share(line, 'data_wait_seconds')} memory={line['memory_gib']:.2f}GiB"]
        told += [
            f"left={self._remaining_time.format(samples)}",
            *(f"{name}={count}" for name, count in anomaly_counts(line).items()),
        ]
        self._print(f"train {' '.join(told)}")
        for warning in warnings:
            self.show_warning(samples, warning)

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """`validation samples=640 held_out=... cache_gap=...`."""
        told = [f"{name}={value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)]
        self._print(f"{kind} samples={samples} {' '.join(told)}")

    def show_warning(self, samples: int, text: str) -> None:
        """`warning samples=640 ...`."""
        self._print(f"warning samples={samples} {text}")

    def print_line(self, text: str) -> None:
        """The line as it is."""
        self._print(text)

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def make_display(title: str, samples: int, max_samples: int) -> RunDisplay:
    """A board where standard output is a terminal, else lines."""
    console = console_of()
    if console.is_terminal and not console.is_dumb_terminal:
        return Dashboard(title, samples, max_samples, console)
    return LogDisplay(samples, max_samples, console)
