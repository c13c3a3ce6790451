"""Studies that are not whole, tried through the real command: each is refused in one line by its key and value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

STUDY: dict[str, Any] = {
    "title": "Is it so?",
    "files": ["configs/tiny.yaml"],
    "samples": 64,
    "seeds": 2,
    "metrics": ["velocity error"],
    "arms": {"A": {"title": "one"}, "B": {"title": "other", "options": {"objective": {"block_weight": 0.0}}}},
    "comparisons": [{"arms": ["B"], "against": ["A"]}],
}


def arm(**values: Any) -> dict[str, Any]:
    return {"arms": {**STUDY["arms"], "B": {"title": "other", **values}}}


BROKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no title": ({"title": ...}, ("title", "required")),
    "no arms": ({"arms": {}}, ("arms",)),
    "a mistyped key": ({"metric": ["velocity error"]}, ("metric",)),
    "one seed": ({"seeds": 1}, ("seeds", "1")),
    "no files": ({"files": []}, ("files",)),
    "a file that is not there": ({"files": ["configs/gone.yaml"]}, ("configs/gone.yaml",)),
    "a study among the files": ({"files": ["configs/ablation/david.yaml"]}, ("unknown section",)),
    "an unknown figure": ({"metrics": ["loss"]}, ("metrics", "loss")),
    "a figure at no steps": ({"metrics": ["paired error at 0 steps"]}, ("paired error at 0 steps",)),
    "a name that leaves the folder": ({"name": "../x"}, ("name", "../x")),
    "an arm that leaves the folder": ({"arms": {"../x": {"title": "x"}}}, ("../x",)),
    "an unknown option": (arm(options={"objektive": {}}), ("arms.B", "objektive")),
    "an unknown inner option": (arm(options={"train": {"batchsize": 8}}), ("arms.B", "batchsize", "did you mean")),
    "a value out of range": (arm(options={"objective": {"block_weight": -1}}), ("arms.B", "block_weight", "-1")),
    "a seed of an arm's own": (arm(options={"train": {"seed": 3}}), ("arms.B.options.train.seed", "seed_offset")),
    "a budget of an arm's own": (arm(options={"train": {"max-samples": 3}}), ("max_samples", "budget")),
    "few steps": (arm(options={"windows": [4]}), ("windows",)),
    "an upload": (arm(options={"hub": {"repo": "a/b"}}), ("hub",)),
    "a run folder of an arm's own": (arm(options={"run": "runs/x"}), ("arms.B.options.run", "--out")),
    "an unknown defect": (arm(defects=["blobs"]), ("defects", "blobs")),
    "an unknown model": (arm(model="sdxl"), ("model", "sdxl")),
    "a teacher that is trained": (arm(model="teacher", options={"graft": False}), ("model teacher",)),
    "two settings that exclude each other": (
        arm(options={"student": {"scratch": True}, "graft": True}),
        ("arm B", "graft"),
    ),
    "an unknown regime of an arm": (arm(regimes=["gone"]), ("arms.B.regimes", "gone")),
    "an unknown arm": ({"comparisons": [{"arms": ["C"], "against": ["A"]}]}, ("comparisons.0.arms", "C")),
    "an unknown control": ({"comparisons": [{"arms": ["B"], "against": ["Z"]}]}, ("comparisons.0.against", "Z")),
    "an unknown outcome": (
        {"comparisons": [{"arms": ["B"], "against": ["A"], "expected": "wins"}]},
        ("expected", "wins"),
    ),
    "samples of no curve": (
        {"comparisons": [{"arms": ["B"], "against": ["A"], "samples": 32}]},
        ("comparisons.0", "samples"),
    ),
    "wrong settings of evaluate": ({"evaluate": {"paired": {"steps": []}}}, ("evaluate", "paired.steps")),
    "options that are no mapping": (arm(options=[1]), ("arms.B.options",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_study_is_refused(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    changes, named = BROKEN[name]
    file = tmp_path / "study.yaml"
    content = {key: value for key, value in {**STUDY, **changes}.items() if value is not ...}
    file.write_text(yaml.safe_dump(content))
    refused(["ablate", str(file), "--out", str(tmp_path / "out")], *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "mapping"),
        ("- a\n", "mapping"),
        ("title: [\n", "good YAML"),
        ("distill: {train: {seed: 1}}\n", "--config"),
        ("title: a\ntitle: b\n", "duplicate"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text: str, named: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    refused(["ablate", str(file), "--out", str(tmp_path / "out")], "study.yaml", named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["gone.yaml"], "gone.yaml"),
        (["--quick", "configs/ablation/optimizers.yaml"], "--quick"),
        (["configs/ablation/adamw_32.yaml"], "adamw_32.yaml"),
        (["--processes", "0"], "--processes"),
        (["--processes", "two"], "--processes"),
        (["--table", "gone.parquet"], "gone.parquet"),
        (["--tabel", "x"], "--tabel"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: list[str], named: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused(["ablate", *words, "--out", str(tmp_path / "out")], named)


def test_two_studies_of_one_name_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(yaml.safe_dump({**STUDY, "name": "same"}))
    refused(["ablate", *map(str, files), "--out", str(tmp_path / "out")], "same: two studies have this name")
