"""The verdicts of an ablation table: differences with their intervals, and each in a plain sentence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.ablation.page import verdict_sentence
from stages.ablation.study import Study
from stages.ablation.table import read_studies, read_table
from stages.ablation.verdicts import Verdict, compute_verdicts
from stages.report.charts import linear_ticks

RULE = (
    "A way of training helps, or hurts, when the 95 % interval of its difference from the control leaves out zero; "
    "runs with the same random seed are compared with each other. Otherwise no difference was found, which does not "
    "say that there is none: the smallest effect that four of five such comparisons would have found stands beside it."
)
WIDTH, MARGIN = 300.0, 28.0
KINDS = {"helps": "helps", "hurts": "hurts"}
"""Verdict -> class of its row; any other is neutral."""


@dataclass(frozen=True)
class ForestRow:
    """One comparison; its numbers are shares of the control's mean."""

    name: str
    difference: float
    low: float
    high: float
    verdict: str
    sentence: str

    @property
    def kind(self) -> str:
        """How the row is coloured."""
        return KINDS.get(self.verdict, "none")

    @property
    def text(self) -> str:
        """The difference with its interval."""
        return f"{self.difference:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


@dataclass(frozen=True)
class Forest:
    """The comparisons of one regime by one metric, on one scale."""

    title: str
    rows: Sequence[ForestRow]

    @property
    def ticks(self) -> list[float]:
        """Round values around all intervals and zero."""
        ends = [end for row in self.rows for end in (row.low, row.high, row.difference)]
        return linear_ticks(min(0.0, *ends), max(0.0, *ends), 4, outside=True)

    def x(self, value: float) -> float:
        """Where a difference is across."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(MARGIN + (value - low) / (high - low) * (WIDTH - 2 * MARGIN), 1)


@dataclass(frozen=True)
class Ablation:
    """All verdicts of one table."""

    forests: Sequence[Forest]
    rule: str = RULE


def read_ablation(path: Path) -> Ablation:
    """The verdicts of a table that `sollune ablate` wrote; raises `Refused` for any other file."""
    studies = read_studies(path)
    return Ablation(make_forests(compute_verdicts(read_table(path), studies), studies))


def make_forests(verdicts: Iterable[Verdict], studies: dict[str, Study]) -> list[Forest]:
    """One for each study, regime and metric, in the order of the verdicts."""
    groups: dict[tuple[str, ...], list[ForestRow]] = {}
    for one in verdicts:
        study = studies[one.study]
        when = "at the end" if one.samples is None else f"after {one.samples:,} samples"
        key = (study.title, study.regimes[one.regime].title, f"{one.metric}, {when}")
        groups.setdefault(key, []).append(_row(one, study))
    return [Forest(": ".join(key), rows) for key, rows in groups.items()]


def _row(one: Verdict, study: Study) -> ForestRow:
    difference, low, high, _ = one.relative
    name = f"{study.arms[one.arm].title} against {study.arms[one.control].title}"
    return ForestRow(name, difference, low, high, one.verdict, f"{verdict_sentence(one, study)}.")
