"""The verdicts on David as a compact table, kept between two comments of a Markdown file such as README.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.ablation.figures import FigureTable
from stages.ablation.page import markdown
from stages.ablation.study import Study
from stages.ablation.table import Row
from stages.ablation.verdicts import Verdict, compute_verdicts
from stages.ablation.wording import NONE, cells_of, seeds_text
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

START, END = "<!-- verdicts -->", "<!-- /verdicts -->"
STUDIES = ("david", "david-quick")
"""Of these the first that the table has."""
ARM, CONTROLS = "D", ("A", "B", "C", "E", "L")
METRICS = ("velocity error", "paired error at 8 steps")
HEADS = ("regime", "David against", "seeds", *METRICS)
HINT = (
    "Paired by seed; less error is better. Each cell: the difference as a share of the control's mean, its 95 % "
    "interval, the smallest effect that four of five such experiments would have found, the verdict."
)


def headline_verdicts(rows: Sequence[Row], studies: Mapping[str, Study]) -> tuple[Study, list[Verdict]]:
    """The study, and David's verdicts of the end of training; raises `Refused` where the table has none."""
    present = {row.study for row in rows}
    for name in STUDIES:
        if name in present and name in studies:
            verdicts = [
                one
                for one in compute_verdicts(rows, {name: studies[name]})
                if one.arm == ARM and one.control in CONTROLS and one.metric in METRICS and one.samples is None
            ]
            regimes = list(studies[name].regimes)
            verdicts.sort(key=lambda one: (regimes.index(one.regime), CONTROLS.index(one.control)))
            if verdicts:
                return studies[name], verdicts
    raise Refused(
        f"table: holds no verdict on David ({' or '.join(STUDIES)}, {ARM} against {', '.join(CONTROLS)}) - run "
        "sollune ablate configs/ablation/david.yaml, or leave --block out"
    )


def render_block(rows: Sequence[Row], studies: Mapping[str, Study]) -> str:
    """The text between the comments."""
    study, verdicts = headline_verdicts(rows, studies)
    budget = "" if study.samples is None else f" Each run has {study.samples:,} samples."
    places: dict[tuple[str, str], dict[str, Verdict]] = {}
    for one in verdicts:
        places.setdefault((one.regime, one.control), {})[one.metric] = one
    lines = []
    for (regime, control), own in places.items():
        seeds = dict.fromkeys(seeds_text(one) for one in own.values())
        cells = [verdict_cell(own[metric]) if metric in own else NONE for metric in METRICS]
        lines.append(
            (study.regimes[regime].title, f"{study.arms[control].title} ({control})", "; ".join(seeds), *cells)
        )
    return f"Study `{study.name}`.{budget} {HINT}\n\n{markdown(FigureTable(HEADS, lines))}"


def verdict_cell(one: Verdict) -> str:
    """The numbers of a verdict and the verdict itself, in one cell."""
    cells = cells_of(one)
    if one.difference.interval is None:
        return f"{cells.difference}; {one.verdict}"
    return f"{cells.difference} ({cells.interval}); {cells.smallest}; {one.verdict}"


def block_of(file: Path) -> str:
    """What stands between the comments of a file; raises `Refused` where they are not there once, in order."""
    _, inner, _ = _split(file)
    return inner


def renew_block(file: Path, text: str) -> None:
    """Put the text between the comments of a file; the rest stays as it is."""
    before, _, after = _split(file)
    atomic_write(file, f"{before}{START}\n{text}{END}{after}")


def _split(file: Path) -> tuple[str, str, str]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file}: cannot be read ({error}) - name a Markdown file such as README.md") from error
    places = content.find(START), content.find(END)
    if content.count(START) != 1 or content.count(END) != 1 or places[0] > places[1]:
        raise Refused(f"{file}: should hold {START} and then {END} once, for the table of verdicts - write them there")
    before, rest = content.split(START)
    inner, after = rest.split(END)
    return before, inner.removeprefix("\n"), after
