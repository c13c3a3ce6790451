"""The figures of a study as tables: each arm's at the end, its learning curve, and the controls of the design."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.ablation.curves import CurvePoint, mean_curve, reached_text, samples_to_final_error
from stages.ablation.metrics import CURVES
from stages.ablation.study import Study
from stages.ablation.verdicts import Values, Verdict, finite_at
from stages.ablation.wording import HELD, NONE, mean_and_deviation, metric_text

MAIN_CURVE = CURVES[0]
MAX_CURVE_COLUMNS = 8


@dataclass(frozen=True)
class FigureTable:
    """A table as text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def arms_with_runs(study: Study, values: Values, regime: str) -> list[str]:
    """The arms that have a run there."""
    return [name for name in study.arms if runs_of(study, values, regime, name)]


def runs_of(study: Study, values: Values, regime: str, arm: str) -> int:
    """How many runs an arm has there."""
    return max((len(values.get((study.name, regime, arm, metric), {})) for metric in study.metrics), default=0)


def arms_table(study: Study) -> FigureTable:
    """What each arm is, and over how many seeds it is planned; few are only looked at."""
    rows = [
        (
            name,
            arm.title,
            f"{study.seeds_of(name)}" + (", only looked at" if study.seeds_of(name) < study.seeds else ""),
        )
        for name, arm in study.arms.items()
    ]
    return FigureTable(("arm", "what it is", "seeds"), rows)


def final_table(study: Study, values: Values, regime: str) -> FigureTable:
    """Means with the standard deviation between seeds, and the samples to the first arm's last error, by its curve."""
    reference, has_curves = next(iter(study.arms)), has_curve(study, values, regime)
    rows = []
    for arm in arms_with_runs(study, values, regime):
        runs = runs_of(study, values, regime, arm)
        cells = [arm, str(runs)]
        for metric in study.metrics:
            finals = [*finite_at(values.get((study.name, regime, arm, metric), {}), None).values()]
            cells.append(mean_and_deviation(finals, runs))
        if has_curves:
            cells.append(reached_text(samples_to_final_error(values, study.name, regime, arm, reference, MAIN_CURVE)))
        rows.append(cells)
    last = [f"samples to {reference}'s last error"] if has_curves else []
    return FigureTable(("arm", "seeds", *study.metrics, *last), rows)


def has_curve(study: Study, values: Values, regime: str) -> bool:
    """Whether any arm has a learning curve there."""
    return any((study.name, regime, arm, MAIN_CURVE) in values for arm in study.arms)


def curves_of(study: Study, values: Values, regime: str) -> dict[str, list[CurvePoint]]:
    """Arm -> the mean of its learning curves; without the arms that have none."""
    curves = {arm: mean_curve(values.get((study.name, regime, arm, MAIN_CURVE), {})) for arm in study.arms}
    return {arm: points for arm, points in curves.items() if points}


def curve_table(curves: dict[str, list[CurvePoint]]) -> FigureTable:
    """The mean at each number of samples with half of its 95 % interval; of long curves evenly chosen points."""
    samples = sorted({point.samples for points in curves.values() for point in points})
    step = -(-len(samples) // MAX_CURVE_COLUMNS)
    shown = samples[::-step][::-1] if samples else []
    rows = []
    for arm, points in curves.items():
        own = {point.samples: point for point in points}
        rows.append([arm, str(points[0].seeds), *(_point_text(own.get(number)) for number in shown)])
    return FigureTable(("arm", "seeds", *(f"{number:,}" for number in shown)), rows)


def controls_table(study: Study, verdicts: Iterable[Verdict]) -> FigureTable:
    """Each control of the design, figure by figure: what was expected, what came out, and whether it held."""
    rows = [
        (
            study.regimes[one.regime].title,
            f"{one.arm} against {one.control}",
            metric_text(one),
            str(one.expected),
            one.verdict,
            HELD[one.passed],
        )
        for one in verdicts
        if one.expected is not None
    ]
    return FigureTable(("regime", "comparison", "figure", "expected", "verdict", "the control"), rows)


def controls_lines(study: Study, verdicts: Iterable[Verdict]) -> list[str]:
    """A sentence on each control of the design: in which figures it held."""
    groups: dict[tuple[str, str, str, str], list[Verdict]] = {}
    for one in verdicts:
        if one.expected is not None:
            groups.setdefault((one.regime, one.arm, one.control, one.expected), []).append(one)
    lines = []
    for (regime, arm, control, expected), own in groups.items():
        by_result = {
            words: [metric_text(one) for one in own if one.passed is passed]
            for passed, words in ((True, "held in"), (False, "did not hold in"), (None, "cannot be said of"))
        }
        parts = [f"{words} {', '.join(names)}" for words, names in by_result.items() if names]
        title = f"{study.arms[arm].title} ({arm}) against {study.arms[control].title} ({control})"
        where = f" ({study.regimes[regime].title})" if len(study.regimes) > 1 else ""
        lines.append(f"{title}{where}, expected: {expected}: {'; '.join(parts)}.")
    return lines


def _point_text(point: CurvePoint | None) -> str:
    if point is None:
        return NONE
    return f"{point.mean:.4f}" + ("" if point.half_width is None else f" ± {point.half_width:.4f}")
