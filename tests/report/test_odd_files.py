"""Laws of odd run folders: numbers that are not finite, texts of any kind and half-made files still give a page."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stages import __main__ as cli
from stages.export.history import read_history
from stages.export.landings import landing_table
from stages.report import pictures
from stages.report.charts import Chart, Series, short
from stages.report.page import make_page
from stages.report.records import read_run
from stages.report.summary import figures, judge, picture_error
from stages.report.tables import few_steps_table, overview_table
from stages.sampling.grids import save_sheet
from stages.system.refusal import Refused
from tests.report.made_runs import make_run, step_line, validation_line, write_lines, write_settings

NAN, INF = float("nan"), float("inf")
ODD_NUMBERS = (NAN, INF, -INF, 1e308, -1e308, 5e-324, 0.0, -0.0, None)
SCRIPT = "</script><script>alert('x')</script>"
TEXTS = {
    "the end of a script": SCRIPT,
    "quotes": "\"a\" 'b' `c` “d”",
    "emoji": "a 🦊 with a 👩‍👩‍👧‍👦",
    "right to left": "כוכב אדום على طاولة",
    "long": "a star " * 300,
    "long without spaces": "星" * 2000,
    "lone surrogate": "a \ud800 star",
    "bidirectional override": "a \u202e star",
    "control characters": "a \x00\x07\x1b[31m star",
    "line ends": "a\nred\r\nstar\u2028x",
    "template": "{{ 7 * 7 }}{% raw %}",
    "empty": "",
}


def data_of(text: str) -> list[Any]:
    """Every piece of JSON of a page, by its standard."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    return [json.loads(one, parse_constant=refuse) for one in found]


def check_page(text: str) -> None:
    """A page that browsers can show: UTF-8, scripts that are its own, no number that is none."""
    text.encode()
    assert text.count("<script>") == 1
    assert data_of(text)
    static = text.split("<script>")[0]
    assert not re.search(r'(?:>|")-?(?:nan|inf)\b|[ML ](?:nan|inf)\b', static.split("</style>")[1])
    assert "None" not in static.split("</style>")[1]


@pytest.mark.parametrize("value", [None, NAN, INF, -INF])
def test_what_is_no_finite_number_is_a_dash(value: float | None) -> None:
    assert short(value) == "–"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_landing_error_that_is_not_finite_is_a_dash(tmp_path: Path, value: float) -> None:
    run = make_run(tmp_path / "run", windows=2)
    error = validation_line(640, 0, 0.01, 2) | {"end": value, "landing": value, "landing_by_s": [value, 0.25]}
    write_lines(run, [step_line(640, 0, 0.01, 2, False), error])
    record = read_run(run, "run")
    assert picture_error(record) is None
    assert judge(record).level == "unknown"
    assert few_steps_table([record]).rows == [["run", "2", "1 to 8", "–", "–", "0.25", "–"]]
    assert overview_table([record], ["x"]).rows[0][-1] == "–"
    history = read_history(run, 640)
    assert history is not None
    assert "| end of all steps | - |" in landing_table(history.landings)
    check_page(make_page([run], None, None).text)


@pytest.mark.parametrize("value", ODD_NUMBERS)
def test_any_number_of_a_journal_may_be_odd(tmp_path: Path, value: float | None) -> None:
    def odd(line: Mapping[str, Any]) -> dict[str, Any]:
        def change(inner: Any) -> Any:
            if isinstance(inner, dict):
                return {key: change(one) for key, one in inner.items()}
            if isinstance(inner, list):
                return [change(one) for one in inner]
            return value if isinstance(inner, float) else inner

        return {key: change(inner) for key, inner in line.items()}

    runs = []
    for seed, windows in ((0, None), (1, None), (2, None), (3, 2)):
        run = make_run(tmp_path / str(seed), seed=seed, windows=windows, classes=True)
        write_lines(run, [odd(json.loads(line)) if number % 3 else json.loads(line)
                          for number, line in enumerate((run / "journal.jsonl").read_text().splitlines())])  # fmt: skip
        runs.append(run)
    check_page(make_page(runs, None, None).text)
    for run in runs:
        write_lines(run, [odd(json.loads(line)) for line in (run / "journal.jsonl").read_text().splitlines()])
    check_page(make_page(runs, None, None).text)


@pytest.mark.parametrize("values", [(NAN, 1.0), (INF, -INF), (1e308, -1e308), (1e308, 1e-308), (5e-324, 1.0), (0.0,)])
def test_a_chart_draws_what_can_be_drawn(values: Sequence[float]) -> None:
    points = [(float(number), value) for number, value in enumerate((*values, 0.5))]
    bands = [(float(number), value, value) for number, value in enumerate(values)]
    chart = Chart("key", "title", "x", "y", "text", [Series("line", points, bands)])
    for one in chart.lines:
        numbers = re.findall(r"[-\d.a-z]+", chart.path(one).replace("M", " ").replace("L", " "))
        assert numbers
        assert all(math.isfinite(float(number)) for number in numbers)
        assert all(0 <= float(number) <= 520 for number in numbers)
        assert "nan" not in chart.band_path(one)
        json.dumps(chart.for_script(), allow_nan=False)
    assert all(math.isfinite(tick) for tick in chart.y_ticks)


def test_watching_goes_on_past_numbers_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_run(tmp_path / "run", windows=2, complete=False), tmp_path / "page.html"
    lines = [validation_line(640, 0, 0.01, 2)]

    def sleep(_seconds: float) -> None:
        write_lines(run, [*lines, {**lines[0], "end": NAN}])
        (run / "COMPLETE").write_text("640\n")

    monkeypatch.setattr("time.sleep", sleep)
    assert cli.main(["report", str(run), "--out", str(out), "--watch", "2"]) == 0
    assert "not measured yet" in out.read_text()


def test_watching_goes_on_past_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, rounds = make_run(tmp_path / "run", complete=False), tmp_path / "page.html", []
    real = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        if rounds == [1] and path.suffix == ".png":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, **options)

    def sleep(_seconds: float) -> None:
        rounds.append(len(rounds) + 1)
        if rounds == [1, 2]:
            (run / "COMPLETE").write_text("640\n")

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr("time.sleep", sleep)
    assert cli.main(["report", str(run), "--out", str(out), "--watch", "2"]) == 0
    assert len(rounds) == 2
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_of_any_text_are_shown(tmp_path: Path, name: str) -> None:
    prompts = ["a red star", TEXTS[name]]
    run = make_run(tmp_path / "run", checkpoints=(640,), prompts=[TEXTS["quotes"], "a ring"], classes=True)
    grid = run / "grids" / "000000640.png"
    with Image.open(grid) as opened:
        sheet = opened.convert("RGB")
    stored = PngInfo()  # in ASCII, as a lone surrogate can be stored
    stored.add_itxt("sollune", json.dumps({"samples": 640, "prompts": prompts, "sampler": {"steps": 25}}))
    sheet.save(grid, pnginfo=stored)
    (run / "evaluation.json").write_text(json.dumps({"samples": 640, "distances": {"prompts": prompts}}))
    classes = {"samples": 640, "kind": "classes", "all": {"x" if name == "lone surrogate" else TEXTS[name]: 0.5}}
    write_lines(run, [step_line(640, 0, 0.01, None, False), classes])
    text = make_page([run], None, None).text
    check_page(text)
    assert ("{{ 7 * 7 }}" in text) == (name == "template")
    rows = data_of(text)[-1]["runs"][0]["sheets"][0]["rows"]
    assert rows[0] == "a red star"
    assert rows[1] == re.sub("[\ud800-\udfff\u202e\x00\x07\x1b]", "\ufffd", TEXTS[name])
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert SCRIPT not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_prompts_are_written_in_their_own_direction(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=[TEXTS["right to left"]])
    text = make_page([run], None, None).text
    assert f'<p class="prompt" dir="auto">“{TEXTS["right to left"]}”</p>' in text


SETTINGS: dict[str, Any] = {
    "text for the sampler": {"prompts": ["a", "b", "c"], "sampler": "euler"},
    "number for sizes": {"prompts": ["a", "b", "c"], "sampler": {"steps": 25}, "sizes": 7},
    "numbers in sizes": {"prompts": ["a", "b", "c"], "sampler": {"steps": 25}, "sizes": [7, 8]},
    "more sizes than columns": {"rows": ["a"], "columns": ["x\ny"], "sizes": ["8x8", "16x8"]},
    "titles of two lines": {"rows": ["a"], "columns": ["x\ny", "z"], "sizes": ["40x40", "40x80"]},
    "list": [1],
    "text": "settings",
    "number for rows": {"rows": 3, "columns": 4},
    "no rows": {"rows": [], "columns": []},
    "numbers for rows": {"rows": [1, 2, 3], "columns": [1, 2, 3]},
    "nothing": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_grid_with_other_settings_is_shown_whole(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", checkpoints=(640,))
    grid = run / "grids" / "000000640.png"
    with Image.open(grid) as opened:
        save_sheet(opened.convert("RGB"), grid, SETTINGS[name])
    check_page(make_page([run], None, None).text)


def test_a_broken_grid_is_refused_by_name_or_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", checkpoints=(640,))
    grid = run / "grids" / "000000640.png"
    content = grid.read_bytes()
    refused = 0
    for number in range(0, len(content), max(1, len(content) // 60)):
        changed = bytearray(content)
        changed[number] ^= 0xFF
        for broken in (bytes(changed), content[:number]):
            grid.write_bytes(broken)
            pictures._encoded_sheet.cache_clear()
            with suppress(Refused):
                pictures.make_album([{640: grid}])
                continue
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere.png")])
def test_a_grid_that_is_no_file_is_refused_by_name(tmp_path: Path, make: Callable[[Path], None]) -> None:
    run = make_run(tmp_path / "run")
    make(run / "grids" / "000000700.png")
    with pytest.raises(Refused, match=r"000000700\.png: .* - remove it"):
        make_page([run], None, None)


def test_runs_that_have_just_begun_have_a_page(tmp_path: Path) -> None:
    for windows in (None, 4):
        run = make_run(tmp_path / f"{windows or 'many'}", windows=windows, complete=False)
        (run / "tensorboard").mkdir()
        for weights in (run / "checkpoints").rglob("*.safetensors"):
            weights.unlink()
        lines = [{key: value for key, value in validation_line(64, 0, 0.01, windows).items() if key != "end"}]
        write_lines(run, [step_line(64, 0, 0.01, windows, False), *lines])
        with open(run / "journal.jsonl", "a") as file:
            file.write('{"samples": 128, "kind": "valid')
        text = make_page([run], None, None).text
        check_page(text)
        assert "It is still training." in text
        (run / "journal.jsonl").write_text("")
        check_page(make_page([run], None, None).text)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": [1], "grid": "x", "fast": "y"},
        {"train": {"max_samples": True}, "fast": {"train": 3}, "grid": {"prompts": "a star"}},
        {"train": {"max_samples": INF}, "grid": {"prompts": [1, None]}},
        {"train": {"max_samples": -5}, "fast": [1]},
        {"train": {"max_samples": 10**400}},
    ],
)
@pytest.mark.parametrize("windows", [None, 2])
def test_settings_of_any_shape_have_a_page_or_are_refused_by_name(
    tmp_path: Path, settings: Any, windows: int | None
) -> None:
    run = make_run(tmp_path / "run", windows=windows, complete=False)
    write_settings(run, 0, 640, windows)
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({"distill": {**content["distill"], **settings}}))
    if windows and not isinstance(settings.get("fast", {}), dict):
        with pytest.raises(Refused, match=r"config\.yaml: not the settings of a run"):
            make_page([run], None, None)
        return
    check_page(make_page([run], None, None).text)
    history = read_history(run, 640)
    assert history is not None
    assert all(isinstance(prompt, str) for prompt in history.prompts)


def test_the_time_of_training_is_hours_minutes_and_seconds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for seconds, shown in ((59.6, "0:01:00"), (3661.0, "1:01:01"), (100 * 3600.0, "100:00:00")):
        write_lines(run, [{"samples": 640, "window_seconds": seconds}])
        assert [one.value for one in figures(read_run(run, "run")) if one.label == "time of training"] == [shown]
