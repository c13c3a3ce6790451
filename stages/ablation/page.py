"""The page of a table: what was compared, the figures of each arm, and every verdict in words, as Markdown."""

from collections.abc import Iterator, Mapping, Sequence

from stages.ablation.figures import (
    MAIN_CURVE,
    FigureTable,
    arms_table,
    arms_with_runs,
    controls_lines,
    controls_table,
    curve_table,
    curves_of,
    final_table,
    has_curve,
)
from stages.ablation.study import Study
from stages.ablation.table import Row
from stages.ablation.verdicts import Values, Verdict, compute_verdicts, values_of
from stages.ablation.wording import RULE, cells_of, metric_text, verdict_sentence

HEAD = f"""\
# Ablation

Made from `docs/ablation.parquet` by `sollune ablate --table docs/ablation.parquet --block README.md`, which renews the
verdicts in README.md; every number can be computed from that table again. `make ablate` makes it ([how](results.md)).

**The rule.** {RULE}
"""


def render_page(rows: Sequence[Row], studies: Mapping[str, Study]) -> str:
    """The whole page."""
    values, verdicts = values_of(rows), compute_verdicts(rows, studies)
    present = {row.study for row in rows}
    parts = [HEAD]
    for name, study in studies.items():
        if name in present:
            own = [verdict for verdict in verdicts if verdict.study == name]
            parts += _study_parts(study, values, own)
    return "\n".join(parts)


def _study_parts(study: Study, values: Values, verdicts: Sequence[Verdict]) -> Iterator[str]:
    budget = "" if study.samples is None else f" Each run has {study.samples:,} samples."
    yield f"## {study.title}\n"
    yield f"Study `{study.name}`.{budget}\n"
    yield markdown(arms_table(study))
    for regime in study.regimes:
        if arms_with_runs(study, values, regime):
            yield f"### {study.regimes[regime].title}\n"
            yield from _figure_parts(study, values, regime)
            yield from _verdict_parts(study, [one for one in verdicts if one.regime == regime])
    if lines := controls_lines(study, verdicts):
        yield "### Controls of the design\n"
        yield "What must come out if the design can be trusted.\n"
        yield "".join(f"- {line}\n" for line in lines)
        yield markdown(controls_table(study, verdicts))


def _figure_parts(study: Study, values: Values, regime: str) -> Iterator[str]:
    last = f"; the last column by the curves of {MAIN_CURVE}" if has_curve(study, values, regime) else ""
    yield f"Means with the standard deviation between seeds{last}.\n"
    yield markdown(final_table(study, values, regime))
    if curves := curves_of(study, values, regime):
        yield f"Learning curves of {MAIN_CURVE}: mean after so many samples ± half of its 95 % interval.\n"
        yield markdown(curve_table(curves))


def _verdict_parts(study: Study, verdicts: Sequence[Verdict]) -> Iterator[str]:
    if not verdicts:
        return
    rows = []
    for one in verdicts:
        cells = cells_of(one)
        numbers = (cells.difference, cells.interval, cells.smallest, cells.seeds, cells.verdict)
        rows.append((f"{one.arm} against {one.control}", metric_text(one), *numbers))
    heads = ("comparison", "figure", "difference", "95 % interval", "smallest effect", "seeds", "verdict")
    yield markdown(FigureTable(heads, rows))
    main = [one for one in verdicts if one.metric == study.metrics[0] and one.samples is None and one.expected is None]
    if main:
        yield "".join(f"- {verdict_sentence(one, study)}.\n" for one in main)


def markdown(table: FigureTable) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(table.heads) + " |", "|" + "---|" * len(table.heads)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"
