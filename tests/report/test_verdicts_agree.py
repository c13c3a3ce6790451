"""Laws of David's verdicts: README, report and table of the studies say the same numbers."""

import html
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.ablation import command
from stages.ablation.block import CONTROLS, METRICS, block_of
from stages.ablation.study import Study, load_study
from stages.ablation.table import Row, read_studies, read_table, write_table
from stages.report.page import make_page
from stages.system.refusal import Refused

COMMITTED, README = Path("docs/ablation.parquet"), Path("README.md")
T_975 = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 6: 2.446912, 7: 2.364624}
T_80 = {2: 1.060660, 3: 0.978472, 4: 0.940965, 5: 0.919544, 6: 0.905703, 7: 0.896030}
"""Degrees of freedom -> the quantiles of Student's t of printed tables."""
CELL = re.compile(r"(?P<difference>\S+?)(?: \((?P<interval>.+?)\); (?P<smallest>\S+?))?; (?P<verdict>[a-z ]+)")


@dataclass(frozen=True)
class Shown:
    """One verdict as it is written somewhere."""

    regime: str
    control: str
    metric: str
    difference: str
    interval: str | None
    smallest: str | None
    verdict: str


def in_markdown(block: str) -> set[Shown]:
    """The verdicts of the table between the comments."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines() if line[:1] == "|"]
    assert rows[0][3:] == list(METRICS)
    return {
        Shown(row[0], row[1], metric, *match.group("difference", "interval", "smallest", "verdict"))
        for row in rows[2:]
        for metric, cell in zip(METRICS, row[3:], strict=True)
        if (match := CELL.fullmatch(cell)) is not None
    }


def in_report(text: str, study: Study) -> set[Shown]:
    """David's verdicts of the main figures in the report: from the forest's rows and the sentences below it."""
    shown = set()
    (own,) = [part for part in text.split("<h3>") if part.startswith(html.escape(study.title))]
    for heading, forest in re.findall(r'<h4>([^<]*)</h4>\s*(<div class="forest".*?</ul>)', own, re.DOTALL):
        regime, figure = html.unescape(heading).rsplit(": ", 1)
        metric = figure.removesuffix(", at the end")
        if metric not in METRICS:
            continue
        values = re.findall(r'forest-value">([^<]*)<.*?forest-verdict">([^<]*)<', forest, re.DOTALL)
        sentences = [html.unescape(one) for one in re.findall(r"<li>(.*?)</li>", forest, re.DOTALL)]
        for (value, verdict), sentence in zip(values, sentences, strict=True):
            names = re.match(r"David \(D\) against (?P<control>.*? \((?P<key>\w+)\)): ", sentence)
            if names is None or names["key"] not in CONTROLS:
                continue
            numbers = re.fullmatch(r"(\S+)(?: \((.*)\))?", html.unescape(value))
            smallest = re.search(r"an effect of (\S+) would", sentence)
            assert numbers is not None
            assert numbers[1] == "-" or numbers[1] in sentence
            assert numbers[2] is None or f"95 % interval {numbers[2]}, " in sentence
            shown.add(
                Shown(regime, names["control"], metric, numbers[1], numbers[2], smallest and smallest[1], verdict)
            )
    return shown


def from_the_table(rows: list[Row], study: Study) -> Iterator[Shown]:
    """The verdicts by the textbook, from the rows alone."""
    for regime, about in study.regimes.items():
        for key in set(CONTROLS) & set(study.arms):
            for metric in METRICS:
                arm, control = ({row.seed: row.value for row in rows if math.isfinite(row.value) and (
                    row.study, row.regime, row.arm, row.metric) == (study.name, regime, name, metric)}
                    for name in ("D", key))  # fmt: skip
                seeds = sorted(arm.keys() & control.keys())
                if not seeds:
                    continue
                apart, n = [arm[seed] - control[seed] for seed in seeds], len(seeds)
                mean, base = statistics.fmean(apart), statistics.fmean(control[seed] for seed in seeds)
                title = f"{study.arms[key].title} ({key})"
                if n < 3 or max(apart) - min(apart) < 1e-12:
                    yield Shown(about.title, title, metric, f"{mean / base:+.1%}", None, None, "no verdict")
                    continue
                error = statistics.stdev(apart) / math.sqrt(n)
                half, smallest = T_975[n - 1] * error, (T_975[n - 1] + T_80[n - 1]) * error
                verdict = "no difference found" if abs(mean) <= half else "helps" if mean < 0 else "hurts"
                interval = f"{(mean - half) / base:+.1%} to {(mean + half) / base:+.1%}"
                yield Shown(
                    about.title, title, metric, f"{mean / base:+.1%}", interval, f"{smallest / base:.1%}", verdict
                )


def test_readme_report_and_table_say_the_same_of_david() -> None:
    rows, studies = read_table(COMMITTED), read_studies(COMMITTED)
    block = block_of(README)
    name = re.search(r"Study `([\w-]+)`", block)
    assert name is not None
    study = studies[name[1]]
    assert name[1] == ("david" if "david" in {row.study for row in rows} else "david-quick")
    in_readme = in_markdown(block)
    assert in_readme
    assert in_readme == in_report(make_page([], COMMITTED, None).text, study) == set(from_the_table(rows, study))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the whole study: two regimes, seeds that diverged or are missing, and some that do not differ."""
    study, path = load_study(Path("configs/ablation/david.yaml")), tmp_path_factory.mktemp("table") / "a.parquet"
    rows = []
    for regime in ("grafted", "scratch"):
        for place, arm in enumerate(("A", "B", "C", "D", "E", "L", "H")):
            for seed in range(8):
                for metric in METRICS:
                    value = 1 + 0.1 * place + 0.05 * math.sin(7 * seed + 3 * place + len(metric))
                    if arm == "B" and metric == METRICS[0]:
                        value = 0.5 + 0.05 * math.sin(7 * seed + 9 + len(metric))  # D's own, and a constant
                    if arm == "D" and seed == 3 and regime == "scratch":
                        value = math.nan
                    if not (arm == "E" and seed > 5):
                        rows.append(Row(study.name, regime, arm, seed, 6400, metric, value, "s", "w"))
    write_table(path, rows, {study.name: study})
    return path


def test_they_agree_on_any_table(made_up: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Before\n<!-- verdicts -->\nold\n<!-- /verdicts -->\nafter\n")
    assert command.main(["--table", str(made_up), "--page", str(tmp_path / "p.md"), "--block", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Before\n<!-- verdicts -->\nStudy `david`")
    assert text.endswith("|\n<!-- /verdicts -->\nafter\n")
    (study,) = read_studies(made_up).values()
    shown = in_markdown(block_of(readme))
    assert len(shown) == 2 * 5 * len(METRICS)
    assert {one.verdict for one in shown} >= {"helps", "hurts", "no verdict"}
    assert (
        shown == in_report(make_page([], made_up, None).text, study) == set(from_the_table(read_table(made_up), study))
    )
    assert "nan" not in text
    assert "7 (1 not finite)" in text
    assert "6 (2 missing)" in text
    # Renewing it again changes nothing
    command.main(["--table", str(made_up), "--page", str(tmp_path / "p.md"), "--block", str(readme)])
    assert readme.read_text() == text


def test_a_table_without_david_has_no_verdicts_for_the_readme(made_up: Path, tmp_path: Path) -> None:
    rows = [row for row in read_table(made_up) if row.arm != "D"]
    path = tmp_path / "other.parquet"
    write_table(path, rows, read_studies(made_up))
    with pytest.raises(Refused, match="no verdict on David"):
        command.main(["--table", str(path), "--page", str(tmp_path / "p.md"), "--block", "README.md"])
    assert not (tmp_path / "p.md").exists()


def test_the_report_shows_curves_with_intervals_deviations_and_controls(made_up: Path, tmp_path: Path) -> None:
    (study,) = read_studies(made_up).values()
    rows = read_table(made_up) + [
        Row(
            "david", "scratch", arm, seed, samples, "validation velocity error", 1 + 0.1 * seed + 10 / samples, "s", "w"
        )
        for arm in ("A", "D", "H")
        for seed in range(3)
        for samples in (100, 200)
    ]
    path = tmp_path / "curves.parquet"
    write_table(path, rows, {"david": study})
    text = make_page([], path, None).text
    assert text.count('class="band"') == 3
    assert "samples to A&#39;s last error" in text
    assert " ± " in text
    assert "3, only looked at" in text
    assert "H) against velocity alone (A)" in text
    assert "expected: hurts" in text
