"""The card of a student of few steps: its example runs as it stands, and its figures are those of its checkpoint."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from stages import __main__ as cli
from stages.export.card import model_card
from stages.export.history import read_history
from tests.few_steps import SAMPLES, make_fast_run

FACTS = {"base_model": "someone/sd-embedded", "samples": 64, "prediction": "velocity", "flow_shift": 1.0}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
MEASURED = {"kind": "validation", "landing": 0.25, "landing_by_s": [0.1, None], "end": 0.0625, "seconds": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 windows, exported with a journal."""
    folder = tmp_path_factory.mktemp("fast") / "2"
    make_fast_run(folder, windows=2)
    lines = [json.dumps({"samples": samples, **MEASURED, "end": samples / 1e4}) for samples in (SAMPLES, SAMPLES * 2)]
    (folder / "journal.jsonl").write_text("\n".join([*lines, '{"samples": 640, "kind": "vali']))
    assert cli.main(["export", str(folder), "--single-file", "false"]) == 0
    return folder


def test_the_example_runs_in_the_folder_where_the_card_lies(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run / "export" / "diffusers", tmp_path / "diffusers"))
    (example,) = PYTHON.findall((folder / "README.md").read_text())
    assert "num_inference_steps=2, guidance_scale=5.0" in example
    monkeypatch.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64)


def test_the_card_states_the_steps_the_scales_and_that_negative_prompts_do_nothing(run: Path) -> None:
    text = (run / "export" / "diffusers" / "README.md").read_text()
    for words in ("**2 steps**", "3 to 8", "**negative prompts do\nnothing**", "0.999, 0.4995, 0"):
        assert words in text
    assert "UniPC" not in text


def test_the_card_shows_the_errors_of_its_checkpoint_alone(run: Path) -> None:
    text = (run / "export" / "diffusers" / "README.md").read_text()
    assert "| landing of a single step | 0.2500 | - | 0.1000 |" in text
    assert "| end of all steps | 0.0640 |" in text
    assert "0.1280" not in text
    history = read_history(run, SAMPLES * 2)
    assert history is not None
    assert "| end of all steps | 0.1280 |" in model_card(FACTS, history)


@pytest.mark.parametrize(
    "change", [{"end": "good"}, {"end": True}, {"landing": None}, {"landing_by_s": "x"}, {"landing_by_s": [[]]}]
)
def test_a_journal_that_was_edited_is_no_figure(run: Path, tmp_path: Path, change: dict[str, object]) -> None:
    copy = tmp_path / "2"
    copy.mkdir()
    shutil.copy(run / "origin.json", copy)
    (copy / "journal.jsonl").write_text(json.dumps({"samples": 64, **MEASURED, **change}))
    history = read_history(copy, 64)
    assert history is not None
    assert not history.landings


@pytest.mark.parametrize(("learnt", "scale"), [([3.0, 8.0], 5.0), ([6.0, 8.0], 6.0), ([1.0, 4.5], 4.5)])
def test_the_example_takes_a_scale_that_was_learnt(learnt: list[float], scale: float) -> None:
    (example,) = PYTHON.findall(model_card({**FACTS, "windows": 1, "guidance_range": learnt}))
    assert f"num_inference_steps=1, guidance_scale={scale}" in example
    assert "**1 step**" in model_card({**FACTS, "windows": 1, "guidance_range": learnt})
