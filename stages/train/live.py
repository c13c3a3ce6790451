"""The display of a run: a dashboard in a terminal, lines of name=value in a log, nothing on other processes."""

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
from rich.table import Column, Table
from rich.text import Text

from stages.system.terminal import console as console_of

SPARKLINE_BARS, ASCII_SPARKLINE_BARS = "▁▂▃▄▅▆▇█", "_.,:-=+#"
REFRESH_SECONDS = 2.0
TREND_LENGTH, MAX_WARNINGS = 48, 3
LOSS_NAMES = ("loss", "flow", "guidance", "block_term", "grad_norm")
"""Those that a line has."""
BLOCK_FORMATS = ("{:.4g}", "{:.3f}", "{:.1e}")
"""Of a block's error, lambda and update ratio."""
BY_S_LABELS = {"flow_by_s": "flow", "guidance_by_s": "guidance", "blocks_by_s": "blocks"}
VALIDATION_LABELS = {
    "held_out": "held out",
    "seen": "seen",
    "seen_new_noise": "seen, new noise",
    "landing": "landing",
    "end": "end of all steps",
}


class RunDisplay:
    """Where the journal shows a run; this base class shows nothing. `line` and `metrics` are what the journal holds."""

    def show_progress(self, samples: int) -> None:
        """Show the samples trained on; called after each step."""

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """Show the means of a window, and the present warnings."""

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Show a line of another kind, such as a validation."""

    def show_warning(self, samples: int, text: str) -> None:
        """Show a problem that does not end the run."""

    def print_line(self, text: str) -> None:
        """Print a line of text that stays on the screen."""

    def close(self) -> None:
        """End the display."""


def make_display(title: str, samples: int, max_samples: int) -> RunDisplay:
    """A dashboard where standard output is a terminal, else lines."""
    console = console_of()
    if console.is_terminal and not console.is_dumb_terminal:
        return Dashboard(title, samples, max_samples, console)
    return LogDisplay(samples, max_samples, console)


class LogDisplay(RunDisplay):
    """One line for each line of the journal: its kind, then name=value."""

    def __init__(self, samples: int, max_samples: int, console: Console) -> None:
        self._remaining_time, self._console = RemainingTime(samples, max_samples), console

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """`train samples=640 of=44800 loss=... left=0:05:12`, and a line for each warning."""
        samples = line["samples"]
        parts = [
            f"samples={samples} of={self._remaining_time.max_samples}",
            *(f"{name}={line[name]:.4g}" for name in LOSS_NAMES if name in line),
            f"lr={line['learning_rate']:.3g} rate={line['samples_per_second']:.1f}/s",
            f"wait={window_share(line, 'data_wait_seconds')} memory={line['memory_gib']:.2f}GiB",
            f"left={self._remaining_time.format(samples)}",
            *(f"{name}={count}" for name, count in anomaly_counts(line).items()),
        ]
        self.print_line(f"train {' '.join(parts)}")
        for warning in warnings:
            self.show_warning(samples, warning)

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """`validation samples=640 held_out=... cache_gap=...`."""
        parts = [f"{name}={value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)]
        self.print_line(f"{kind} samples={samples} {' '.join(parts)}")

    def show_warning(self, samples: int, text: str) -> None:
        """`warning samples=640 ...`."""
        self.print_line(f"warning samples={samples} {text}")

    def print_line(self, text: str) -> None:
        """Print the text unchanged."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Dashboard(RunDisplay):
    """A panel with the whole run, redrawn every other second."""

    def __init__(self, title: str, samples: int, max_samples: int, console: Console) -> None:
        self.title, self.samples, self._remaining_time = title, samples, RemainingTime(samples, max_samples)
        self._bars = ASCII_SPARKLINE_BARS if console.options.ascii_only else SPARKLINE_BARS
        self._latest_line: Mapping[str, Any] = {}
        self._latest_events: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._trend: deque[float] = deque(maxlen=TREND_LENGTH)
        self._current_warnings: Sequence[str] = ()
        self._past_warnings: deque[str] = deque(maxlen=MAX_WARNINGS)
        # Drawn between two steps, so that no second thread competes with them.
        self._live = Live(self.render(), console=console, auto_refresh=False)
        self._live.start()
        self._refreshed_at = time.monotonic()

    def show_progress(self, samples: int) -> None:
        """Move the bar, unless it was drawn a moment ago."""
        self.samples = samples
        if time.monotonic() - self._refreshed_at >= REFRESH_SECONDS:
            self._refresh()

    def show_line(self, line: Mapping[str, Any], warnings: Sequence[str]) -> None:
        """Show the newest means in place of those before."""
        self._latest_line, self._current_warnings = line, tuple(warnings)
        self._trend.append(line["flow"])
        self._refresh()

    def show_event(self, samples: int, kind: str, metrics: Mapping[str, Any]) -> None:
        """Keep the last validation and the last exam of classes; anything else is a warning."""
        if kind not in ("validation", "classes"):
            self.show_warning(samples, f"{kind}: {metrics}")
            return
        self._latest_events[kind] = samples, metrics
        self._refresh()

    def show_warning(self, samples: int, text: str) -> None:
        """Keep the last few."""
        self._past_warnings.append(f"after {samples}: {text}")
        self._refresh()

    def print_line(self, text: str) -> None:
        """Print a line above the panel."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._refresh()
        self._live.stop()

    def render(self) -> RenderableType:
        """All tables in one panel."""
        parts: list[RenderableType] = [self._header()]
        if line := self._latest_line:
            columns = Table.grid(padding=(0, 4))
            columns.add_row(_blocks_table(line), _by_s_table(line, self._bars))
            parts += [Text(""), self._metrics_table(line), Text(""), columns]
        if validation := self._latest_events.get("validation"):
            parts += [Text(""), _validation_table(*validation, self._bars)]
        flow_by_class, exam = line.get("flow_by_class", {}), self._latest_events.get("classes")
        if flow_by_class or exam:
            parts += [Text(""), _classes_table(flow_by_class, *(exam or (0, {})))]
        if warnings := (*self._current_warnings, *self._past_warnings):
            parts += [Text(""), *(Text(f"! {text}", style="yellow") for text in warnings)]
        return Panel(Group(*parts), title=escape(self.title), title_align="left", border_style="dim", padding=(0, 1))

    def _refresh(self) -> None:
        self._live.update(self.render(), refresh=True)
        self._refreshed_at = time.monotonic()

    def _header(self) -> Table:
        total, samples = self._remaining_time.max_samples, self.samples
        rate = f"{self._latest_line['samples_per_second']:.1f} samples/s, " if self._latest_line else ""
        bar = ProgressBar(total=total, completed=samples, width=32)
        header = Table.grid(padding=(0, 2))
        header.add_row(bar, f"{samples:,} of {total:,} samples", f"{rate}{self._remaining_time.format(samples)} left")
        return header

    def _metrics_table(self, line: Mapping[str, Any]) -> Table:
        table = Table.grid(padding=(0, 3))
        losses = [name for name in LOSS_NAMES if name in line]
        table.add_row(*(_label_value(name.replace("_", " "), f"{line[name]:.4g}") for name in losses))
        table.add_row(
            _label_value("rate", f"{line['learning_rate']:.2e}"),
            _label_value("data wait", window_share(line, "data_wait_seconds")),
            _label_value("bookkeeping", window_share(line, "bookkeeping_seconds")),
            _label_value("effective", f"{100 * line['effective_size']:.0f} %"),
            _label_value("memory", f"{line['memory_gib']:.2f} GiB"),
        )
        table.add_row(_label_value("flow so far", ""), Text(sparkline(list(self._trend), self._bars), style="cyan"))
        if counts := anomaly_counts(line):
            table.add_row(*(Text(f"{name} {count}", style="yellow") for name, count in counts.items()))
        return table


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
    """The run's skipped steps and loss spikes, where there are any."""
    return {name: line[name] for name in ("skipped", "spikes") if line.get(name)}


def sparkline(values: Sequence[float | None], bars: str = SPARKLINE_BARS) -> str:
    """One character a value, its height over that of the largest; a blank for None."""
    highest = max((value for value in values if value is not None), default=0.0)
    if not highest > 0:
        return "".join(" " if value is None else bars[0] for value in values)
    top = len(bars) - 1
    return "".join(" " if value is None else bars[max(0, min(top, round(top * value / highest)))] for value in values)


def _blocks_table(line: Mapping[str, Any]) -> Table:
    """A row for each block: its error, its lambda, and its update ratio |dw| / |w|."""
    table = _table("block", ">error", ">lambda", ">update")
    columns = (line["blocks"], line["lambdas"], line.get("update_ratio", {}))
    for block in dict.fromkeys((*columns[0], *columns[2])):
        values = zip((column.get(block) for column in columns), BLOCK_FORMATS, strict=True)
        table.add_row(block, *("" if value is None else text.format(value) for value, text in values))
    return table


def _by_s_table(line: Mapping[str, Any], bars: str) -> Table:
    """A row for each part of the loss: a sparkline over s, and the largest value."""
    table = _table("error by s", "0 .. 1", ">largest")
    for key, name in BY_S_LABELS.items():
        if key not in line:
            continue
        largest = max((value for value in line[key] if value is not None), default=0.0)
        table.add_row(name, Text(sparkline(line[key], bars), style="cyan"), f"{largest:.4g}")
    return table


def _validation_table(samples: int, metrics: Mapping[str, Any], bars: str) -> Table:
    """A row for each set of states, and the gap between stored and new noise."""
    table = _table(f"validation after {samples:,}", ">error", "s 0 .. 1")
    for key, name in VALIDATION_LABELS.items():
        if key in metrics:
            by_s = sparkline(metrics.get(f"{key}_by_s", ()), bars)
            table.add_row(name, f"{metrics[key]:.4f}", Text(by_s, style="cyan"))
    if "cache_gap" in metrics:
        table.add_row("cache gap", f"{metrics['cache_gap']:+.4f}")
    return table


def _classes_table(flow: Mapping[str, float | None], samples: int, exam: Mapping[str, Any]) -> Table:
    """A row for each class: its present flow error, and its results in the last exam."""
    results = {name: values for name, values in exam.items() if isinstance(values, Mapping)}
    table = _table("class", ">flow", *(f">{name.replace('_', ' ')} after {samples:,}" for name in results))
    for class_name in dict.fromkeys((*flow, *(key for values in results.values() for key in values))):
        cells = (values.get(class_name) for values in (flow, *results.values()))
        table.add_row(escape(class_name), *("" if value is None else f"{value:.4g}" for value in cells))
    return table


def _table(*heads: str) -> Table:
    """A table without borders; as in a format string, > aligns a column to the right."""
    columns = (Column(head.removeprefix(">"), justify="right" if head.startswith(">") else "left") for head in heads)
    return Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="dim")


def _label_value(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), value)
