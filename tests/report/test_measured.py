"""Laws of what was measured: every figure has its place on the page and in the card, and a missing one is a dash."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import __main__ as cli
from stages.evaluate.distances.columns import Band, Column, Distances, Floor
from stages.evaluate.gates import Gates
from stages.evaluate.metrics import fidelity_of
from stages.evaluate.paired import PairedError
from stages.evaluate.report import (
    STUDENT,
    STUDENT_AS_NOISE_MODEL,
    TEACHER,
    Evaluation,
    SizeErrors,
    check_gates,
    to_json,
)
from stages.evaluate.straightness import Straightness
from stages.export.card import model_card
from stages.export.history import read_history
from stages.report.page import make_page
from stages.report.records import read_run
from stages.report.summary import figures, judge
from stages.report.tables import evaluation_tables
from stages.system.refusal import Refused
from stages.train.validation import RelativeError, VelocityErrors
from tests.report.made_runs import gates, make_run

SAMPLES = 640
SENTENCES = [f"sentence {number} of a star" for number in range(40)]
NAN = float("nan")


def measured(unnamed: float = 0.5, samples: int = SAMPLES, straightness: Straightness | None = None) -> Evaluation:
    """An evaluation of everything; `unnamed` is what a scorer gives an attribute."""
    share = fidelity_of({"shape": torch.tensor([1.0, 0.0]), "size": torch.tensor([unnamed, unnamed])})
    error = PairedError(4, 0.2, 0.1, 1.1, 0.125, (0.1, 0.2))
    relative = RelativeError(0.0123, (0.1, None))
    floor = Floor(8, Band(0.01, 0.02), Band(0.03, 0.04))
    return Evaluation(
        run="runs/x",
        samples=samples,
        tail="hold",
        settings={},
        fidelity={TEACHER: share, STUDENT: share, STUDENT_AS_NOISE_MODEL: share},
        paired={STUDENT: [error]},
        velocity=VelocityErrors(relative, relative, 600),
        size="64x64",
        by_size={"64x64": SizeErrors([error], 0.25), "64x96": SizeErrors([error], 0.5)},
        straightness=straightness or Straightness(16, {TEACHER: 50, STUDENT: 25}, {TEACHER: 0.1234, STUDENT: 0.0567}),
        distances=Distances("clip", 8, "the teacher's", floor, {STUDENT: [Column(8, 4, 0.5, 0.6, 0.7)]}, SENTENCES),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "RUN")


def write(run: Path, content: Any) -> None:
    (run / "evaluation.json").write_text(content if isinstance(content, str) else json.dumps(content))


def cells_of(run: Path, title: str) -> dict[str, list[str]]:
    """The rows of a table of the run's evaluation by their first cells."""
    tables = [table for table in evaluation_tables(read_run(run, "run")) if table.title.startswith(title)]
    assert len(tables) == 1
    return {row[0]: list(row[1:]) for row in tables[0].rows}


def leaves(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value that is no list and no object, with the keys that lead to it."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if inner is None:
        yield place, content
        return
    for key, value in inner:
        yield from leaves(value, (*place, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    copy = json.loads(json.dumps(content))
    at = copy
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return copy


def everything(run: Path) -> str:
    """All that readers make of an evaluation, as text."""
    record = read_run(run, "run")
    card = model_card({"samples": SAMPLES, "prediction": "velocity", "flow_shift": 1.0}, read_history(run, SAMPLES))
    return f"{evaluation_tables(record)}{judge(record)}{figures(record)}{card}"


def test_an_attribute_that_no_sentence_names_is_a_dash(run: Path) -> None:
    write(run, to_json(measured(unnamed=NAN), []))
    assert cells_of(run, "Pictures that show")["student"] == ["50.0", "–", "50.0"]
    assert "| student | 50.0 | - | 50.0 | 2 |" in everything(run)
    assert "–" in make_page([run], None, None).text


def test_a_limit_is_not_checked_of_an_attribute_that_no_sentence_names() -> None:
    names = [one.name for one in check_gates(measured(unnamed=NAN), Gates(attribute_loss=0.05))]
    assert names == ["shape lost to the teacher", f"control: {STUDENT_AS_NOISE_MODEL} loses"]
    assert len(check_gates(measured(), Gates(attribute_loss=0.05))) == 3


def test_any_measured_number_may_be_missing(run: Path) -> None:
    whole = {**json.loads(to_json(measured(), [])), **gates(True)}
    numbers = [(place, value) for place, value in leaves(whole) if isinstance(value, float)]
    assert len(numbers) > 40
    for (place, _), missing in zip(numbers, cycle((None, NAN, float("inf"), -float("inf")))):
        write(run, changed(whole, place, missing))
        assert not re.search(r"\b(nan|inf|None)\b", everything(run)), place


@pytest.mark.parametrize("value", ["0.5", True, [0.5], {"mean": 0.5}, 10**400, "\ud800"])
def test_what_is_no_number_is_named(run: Path, value: Any) -> None:
    whole = {**json.loads(to_json(measured(), [])), **gates(True)}
    for place, number in leaves(whole):
        if isinstance(number, bool) or not isinstance(number, int | float) or "distances" in place:
            continue
        write(run, changed(whole, place, value))
        with pytest.raises(Refused, match=r"evaluation\.json: .* - measure again or remove it") as refused:
            everything(run)
        assert "\n" not in str(refused.value)


def test_straightness_stands_on_the_page(run: Path) -> None:
    write(run, to_json(measured(), []))
    assert cells_of(run, "Straightness") == {"teacher": ["50", "0.123"], "student": ["25", "0.0567"]}
    write(run, to_json(measured(straightness=Straightness(1, {STUDENT: 25}, {STUDENT: NAN})), []))
    assert cells_of(run, "Straightness") == {"student": ["25", "–"]}
    assert "0.0567" not in make_page([run], None, None).text


def test_lists_of_sentences_are_counted_and_begun(run: Path) -> None:
    write(run, to_json(measured(), []))
    (cell,) = cells_of(run, "Distances")["prompts"]
    assert cell == "40: “sentence 0 of a star”, “sentence 1 of a star”, “sentence 2 of a star”, …"
    few = {**json.loads(to_json(measured(), [])), "distances": {"prompts": ["a", "b"], "limits": [0.5, None, 2]}}
    write(run, few)
    assert cells_of(run, "Distances") == {"prompts": ["2: “a”, “b”"], "limits": ["0.5, –, 2"]}
    write(run, {**few, "distances": {"prompts": ["x" * 2000]}})
    (cell,) = cells_of(run, "Distances")["prompts"]
    assert cell == f"1: “{'x' * 60}…”"


@pytest.mark.parametrize(
    "left_out", ["size", "by_size", "straightness", "distances", "settings", "velocity", "fidelity", "paired", "gates"]
)
def test_an_evaluation_of_an_older_version_is_shown(run: Path, left_out: str) -> None:
    whole: Mapping[str, Any] = json.loads(to_json(measured(), []))
    write(run, {key: value for key, value in whole.items() if key != left_out})
    everything(run)
    write(run, {**whole, left_out: None})
    everything(run)


def test_paired_errors_of_before_had_no_interval(run: Path) -> None:
    error = {"steps": 25, "student": 0.2, "floor": 0.1, "ceiling": 1.1, "score": 0.1}
    write(run, {"samples": SAMPLES, "paired": {"student": [error]}})
    assert cells_of(run, "Same noise")["student"][-1] == "–"


def test_measured_loras_and_conversions_may_miss_numbers_too(run: Path) -> None:
    error = {"steps": 4, "student": None, "floor": 0.1, "ceiling": 1.0, "score": None, "interval": [None, None]}
    ratio = {"steps": 4, "ratio": None, "ratio_interval": [None, None]}
    (run / "convert.json").write_text(
        json.dumps({"samples": SAMPLES, "errors": {"base": [error]}, "comparisons": {"base": [ratio]}})
    )
    effect = {"overall": {"ratio": None}}
    strength = {"strength": 1, "scale": 1.0, "student": error, "without": error, "conditional": effect,
                "unconditional": effect}  # fmt: skip
    (run / "loras").mkdir()
    (run / "loras" / "x.json").write_text(
        json.dumps({"samples": SAMPLES, "name": "x", "strengths": [strength], "correction": None})
    )
    assert "| base | 4 | - | 0.1000 | 1.0000 | - | - | - | - |" in everything(run)
    assert "| `x` | 1 | - | - | - | - | - | its own |" in everything(run)
    assert cells_of(run, "LoRAs")["x"] == ["1", "-", "-", "-", "-", "-", "its own"]
    assert cells_of(run, "Conversion")["base"] == ["4", "–", "0.1", "1", "–", "–"]


def test_a_report_of_such_a_run_is_written(run: Path, tmp_path: Path) -> None:
    write(run, to_json(measured(unnamed=NAN), []))
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
