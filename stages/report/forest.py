"""The verdicts of an ablation table: differences with their intervals, and each in a plain sentence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.ablation.figures import MAIN_CURVE, arms_table, arms_with_runs, controls_lines, curves_of, final_table
from stages.ablation.study import Study
from stages.ablation.table import read_inputs, read_studies, read_table
from stages.ablation.verdicts import Values, Verdict, compute_verdicts, values_of
from stages.ablation.wording import RULE, VerdictCells, cells_of, verdict_sentence
from stages.report.basis import CACHE, basis_table, doubts, shown_path
from stages.report.charts import Chart, Series, drawable, linear_ticks
from stages.report.records import RunRecord
from stages.report.tables import PageTable

WIDTH, MARGIN = 300.0, 28.0
KINDS = {"helps": "helps", "hurts": "hurts"}
"""Verdict -> class of its row; any other is neutral."""
FINAL_TEXT = (
    "Means at the end of training, with the standard deviation between runs that differ in their random seed alone; "
    "the last column, where there is one: after how many samples the run is as good as the first one at its end."
)
CURVE_TEXT = (
    "How far predictions are from the teacher's on data kept out of training; bands: the 95 % interval of the mean."
)


@dataclass(frozen=True)
class ForestRow:
    """One comparison; its numbers are shares of the control's mean, or None where they cannot be given."""

    name: str
    difference: float | None
    low: float | None
    high: float | None
    verdict: str
    sentence: str
    cells: VerdictCells

    @property
    def kind(self) -> str:
        """How the row is coloured."""
        return KINDS.get(self.verdict, "none")

    @property
    def text(self) -> str:
        """The difference with its interval."""
        return f"{self.cells.difference} ({self.cells.interval})" if self.low is not None else self.cells.difference


@dataclass(frozen=True)
class Forest:
    """The comparisons of one regime by one metric, on one scale."""

    title: str
    rows: Sequence[ForestRow]
    is_relative: bool = True
    """Whether differences are shares of the control's mean."""

    @property
    def ticks(self) -> list[float]:
        """Round values around all intervals and zero."""
        ends = [end for row in self.rows for end in (row.low, row.high, row.difference) if end is not None]
        return linear_ticks(min([0.0, *ends]), max([0.0, *ends]), 4, outside=True)

    def tick_text(self, value: float) -> str:
        """A value of the scale."""
        return f"{100 * value:+.3g} %" if self.is_relative else f"{value:+.3g}"

    def x(self, value: float) -> float:
        """Where a difference is across."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(MARGIN + (value - low) / (high - low) * (WIDTH - 2 * MARGIN), 1)


@dataclass(frozen=True)
class StudyPart:
    """What is shown of one study."""

    title: str
    basis: PageTable
    doubts: Sequence[str]
    """what it may not say about the runs of the page, where those are of another cache"""
    arms: PageTable
    finals: Sequence[PageTable]
    charts: Sequence[Chart]
    forests: Sequence[Forest]
    controls: Sequence[str]
    """a sentence on each control of the design"""


@dataclass(frozen=True)
class Ablation:
    """All verdicts of one table."""

    table: str
    studies: Sequence[StudyPart]
    rule: str = RULE

    @property
    def forests(self) -> list[Forest]:
        """Of all studies."""
        return [forest for part in self.studies for forest in part.forests]


def read_ablation(path: Path, runs: Sequence[RunRecord] = ()) -> Ablation:
    """The verdicts of a table that `sollune ablate` wrote, beside these runs; raises `Refused` for any other file."""
    studies, rows, inputs = read_studies(path), read_table(path), read_inputs(path)
    values, verdicts, present = values_of(rows), compute_verdicts(rows, studies), {row.study for row in rows}
    return Ablation(shown_path(path), [
        _part(number, study, values, [one for one in verdicts if one.study == name], inputs.get(name, {}), runs)
        for number, (name, study) in enumerate(studies.items())
        if name in present
    ])  # fmt: skip


def _part(
    number: int,
    study: Study,
    values: Values,
    verdicts: Sequence[Verdict],
    read: Mapping[str, str],
    runs: Sequence[RunRecord],
) -> StudyPart:
    finals, charts = [], []
    for place, (regime, about) in enumerate(study.regimes.items()):
        if not arms_with_runs(study, values, regime):
            continue
        final = final_table(study, values, regime)
        finals.append(PageTable(about.title, final.heads, final.rows, FINAL_TEXT))
        lines = [
            Series(
                f"{arm}: {study.arms[arm].title} ({points[0].seeds} seeds)",
                [(float(point.samples), point.mean) for point in points],
                [
                    (float(point.samples), point.mean - point.half_width, point.mean + point.half_width)
                    for point in points
                    if point.half_width is not None
                ],
            )
            for arm, points in curves_of(study, values, regime).items()
        ]
        key = f"study-{number}-{place}"
        charts.append(Chart(key, f"{about.title}: {MAIN_CURVE}", "training samples", "error", CURVE_TEXT, lines))
    arms = arms_table(study)
    return StudyPart(
        title=study.title,
        basis=basis_table(study.files, read),
        doubts=doubts(read.get(CACHE), runs),
        arms=PageTable("What was compared", arms.heads, arms.rows),
        finals=finals,
        charts=[chart for chart in charts if chart.lines],
        forests=make_forests(verdicts, study),
        controls=[line.replace("**", "") for line in controls_lines(study, verdicts)],
    )


def make_forests(verdicts: Iterable[Verdict], study: Study) -> list[Forest]:
    """One for each regime and metric, in the order of the verdicts; absolute differences apart."""
    groups: dict[tuple[str, str, bool], list[ForestRow]] = {}
    for one in verdicts:
        when = "at the end" if one.samples is None else f"after {one.samples:,} samples"
        key = (study.regimes[one.regime].title, f"{one.metric}, {when}", one.is_relative)
        groups.setdefault(key, []).append(_row(one, study))
    return [Forest(f"{regime}: {metric}", rows, relative)
            for (regime, metric, relative), rows in groups.items()]  # fmt: skip


def _row(one: Verdict, study: Study) -> ForestRow:
    relative = one.relative
    name = f"{study.arms[one.arm].title} against {study.arms[one.control].title}"
    own = relative.interval
    ends = (None, None) if own is None else (drawable(own.low), drawable(own.high))
    low, high = ends if None not in ends else (None, None)
    return ForestRow(
        name=name,
        difference=drawable(relative.mean),
        low=low,
        high=high,
        verdict=one.verdict,
        sentence=f"{verdict_sentence(one, study)}.",
        cells=cells_of(one),
    )
