"""The page of a table: what was compared, the figures of each arm, and every verdict in words, as Markdown."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from stages.ablation.curves import samples_to_final_error
from stages.ablation.metrics import CURVES
from stages.ablation.study import Study
from stages.ablation.table import Row
from stages.ablation.verdicts import Values, Verdict, at_samples, compute_verdicts, values_of

HEAD = """\
# Ablation

Made from `docs/ablation.parquet` by `sollune ablate --table docs/ablation.parquet`; every number can be computed from
that table again. `make ablate` makes the table ([how](results.md)).

**The rule.** Runs of the same seed are compared: the same order of the data and the same random numbers. An arm *helps*
or *hurts* where the 95 % interval of the mean difference (Student's t over the seeds) excludes 0; else *no difference
was found*, which does not say that there is none: beside it stands the smallest effect that four of five such
experiments would have found. Differences are shares of the control's mean. Each verdict stands for itself: of twenty
about nothing, one will be wrong.
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


def verdict_sentence(verdict: Verdict, study: Study) -> str:
    """A verdict in plain words, with its interval and the smallest effect that could have been seen."""
    arm, control = (f"{study.arms[name].title} ({name})" for name in (verdict.arm, verdict.control))
    difference, low, high, smallest = verdict.relative
    when = "" if verdict.samples is None else f" after {verdict.samples:,} samples"
    outcome = {"helps": "helps", "hurts": "hurts", "no difference found": "no difference was found"}[verdict.verdict]
    return (
        f"{arm} against {control}: {outcome} in {verdict.metric}{when}: {difference:+.1%}, "
        f"95 % interval {low:+.1%} to {high:+.1%}, {verdict.seeds} seeds; an effect of {smallest:.1%} would have been "
        "found in four of five such experiments"
    )


def _study_parts(study: Study, values: Values, verdicts: Sequence[Verdict]) -> Iterator[str]:
    budget = "" if study.samples is None else f" Each run has {study.samples:,} samples."
    yield f"## {study.title}\n"
    yield f"Study `{study.name}`.{budget}\n"
    yield _table(("arm", "what it is"), ((name, arm.title) for name, arm in study.arms.items()))
    for regime in study.regimes:
        arms = [name for name in study.arms if _runs_of(study, values, regime, name)]
        if arms:
            yield f"### {study.regimes[regime].title}\n"
            yield _figures_table(study, values, regime, arms)
            yield from _verdict_parts(study, [one for one in verdicts if one.regime == regime])
    controls = [one for one in verdicts if one.expected is not None]
    if controls:
        yield "### Controls of the design\n"
        yield "What must come out if the design can be trusted.\n"
        rows = [
            (
                study.regimes[one.regime].title,
                f"{one.arm} against {one.control}",
                _metric_text(one),
                str(one.expected),
                one.verdict,
                "pass" if one.passed else "**fail**",
            )
            for one in controls
        ]
        yield _table(("regime", "comparison", "figure", "expected", "verdict", ""), rows)


def _runs_of(study: Study, values: Values, regime: str, arm: str) -> int:
    return max((len(values.get((study.name, regime, arm, metric), {})) for metric in study.metrics), default=0)


def _figures_table(study: Study, values: Values, regime: str, arms: Sequence[str]) -> str:
    reference, curve = next(iter(study.arms)), CURVES[0]
    rows = []
    for arm in arms:
        cells = [arm, str(_runs_of(study, values, regime, arm))]
        for metric in study.metrics:
            finals = [*at_samples(values.get((study.name, regime, arm, metric), {}), None).values()]
            cells.append(_mean_and_deviation(finals))
        reached = samples_to_final_error(values, study.name, regime, arm, reference, curve)
        if reached is None:
            cells.append("-")
        elif reached.mean_samples is None:
            cells.append("never")
        else:
            some = "" if reached.seeds_reached == reached.seeds else f" ({reached.seeds_reached} of {reached.seeds})"
            cells.append(f"{reached.mean_samples:,.0f}{some}")
        rows.append(cells)
    text = _table(("arm", "seeds", *study.metrics, f"samples to {reference}'s last error"), rows)
    return f"Means with the standard deviation between seeds; the last column by the curves of {curve}.\n\n{text}"


def _verdict_parts(study: Study, verdicts: Sequence[Verdict]) -> Iterator[str]:
    if not verdicts:
        return
    rows = []
    for one in verdicts:
        difference, low, high, smallest = one.relative
        interval = f"{low:+.1%} to {high:+.1%}"
        cells = (f"{difference:+.1%}", interval, f"{smallest:.1%}", str(one.seeds), one.verdict)
        rows.append((f"{one.arm} against {one.control}", _metric_text(one), *cells))
    columns = ("comparison", "figure", "difference", "95 % interval", "smallest effect", "seeds", "verdict")
    yield _table(columns, rows)
    main = [one for one in verdicts if one.metric == study.metrics[0] and one.samples is None and one.expected is None]
    if main:
        yield "".join(f"- {verdict_sentence(one, study)}.\n" for one in main)


def _metric_text(verdict: Verdict) -> str:
    return verdict.metric if verdict.samples is None else f"{verdict.metric} after {verdict.samples:,} samples"


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
