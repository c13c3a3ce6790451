"""Studies of finetune-classes that are not whole, tried through the real command: each is refused in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

STUDY: dict[str, Any] = {
    "title": "Is it so?",
    "command": "finetune_classes",
    "files": ["configs/tiny.yaml"],
    "samples": 64,
    "seeds": 2,
    "metrics": ["pictures right, top classes"],
    "arms": {"A": {"title": "one"}, "B": {"title": "other", "options": {"prior_share": 0.5}}},
    "comparisons": [{"arms": ["B"], "against": ["A"]}],
}


def arm(**values: Any) -> dict[str, Any]:
    return {"arms": {**STUDY["arms"], "B": {"title": "other", **values}}}


QUICK = {"samples": 32, "arms": ["A"], "regimes": ["only"]}
BROKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown command": ({"command": "convert"}, ("command", "convert")),
    "a figure of distill": ({"metrics": ["velocity error"]}, ("metrics", "velocity error", "pictures right, top")),
    "a curve": ({"metrics": ["cache gap"]}, ("metrics", "cache gap")),
    "an unknown priority": ({"metrics": ["pictures right, best classes"]}, ("best classes",)),
    "a figure of classes in a study of distill": ({"command": "distill"}, ("metrics", "pictures right, top classes")),
    "settings of evaluate": ({"evaluate": {"velocity_states": 8}}, ("evaluate", "exam")),
    "settings of evaluate in quick": ({"quick": {**QUICK, "evaluate": {"seed": 1}}}, ("quick.evaluate", "exam")),
    "guidance scales": ({"guidance": [1, 5]}, ("guidance", "exam")),
    "a defect": (arm(defects=["noise_input"]), ("arms.B", "defects")),
    "the teacher as a model": (arm(model="teacher"), ("arms.B", "model")),
    "a setting of distill alone": (arm(options={"graft": False}), ("arms.B", "graft")),
    "a seed of an arm's own": (arm(options={"train": {"seed": 3}}), ("arms.B.options.train.seed", "seed_offset")),
    "a seed of the adapters": (arm(options={"lora": {"rank": 2, "seed": 3}}), ("arms.B.options.lora.seed",)),
    "an early end": (arm(options={"stop": {"patience": 2}}), ("arms.B.options.stop", "budget")),
    "an upload": (arm(options={"hub": {"repo": "a/b"}}), ("hub",)),
    "a class file that is not there": (arm(options={"classes": "configs/classes/gone.yaml"}), ("gone.yaml",)),
    "a study as its class file": (arm(options={"classes": "configs/ablation/david.yaml"}), ("david.yaml",)),
    "samples of no curve": (
        {"comparisons": [{"arms": ["B"], "against": ["A"], "samples": 32}]},
        ("comparisons.0", "samples"),
    ),
    "a control that must give no verdict": (
        {"comparisons": [{"arms": ["B"], "against": ["A"], "expected": "no verdict"}]},
        ("expected", "no verdict"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_study_of_classes_is_refused(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    changes, named = BROKEN[name]
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}))
    refused(["ablate", str(file), "--out", str(tmp_path / "out")], *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, ("README.md", "cannot be read")),
        ("no comments\n", ("<!-- verdicts -->",)),
        ("<!-- verdicts -->\n", ("<!-- /verdicts -->",)),
        ("<!-- /verdicts -->\n<!-- verdicts -->\n", ("<!-- verdicts -->",)),
        ("<!-- verdicts -->\n<!-- /verdicts -->\n" * 2, ("once",)),
    ],
)
def test_a_file_without_a_place_for_the_verdicts_is_refused_before_the_page_is_written(
    text: str | None, named: tuple[str, ...], tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "README.md"
    if text is not None:
        file.write_text(text)
    words = ["ablate", "--table", "docs/ablation.parquet", "--page", str(tmp_path / "page.md"), "--block", str(file)]
    refused(words, *named)


@pytest.mark.parametrize(
    ("page", "block"),
    [
        ("README.md", "README.md"),
        ("sub/../README.md", "README.md"),
        ("link.md", "README.md"),
        ("README.md", "link.md"),
        ("linked/README.md", "README.md"),
        ("hard.md", "README.md"),
    ],
)
def test_a_page_that_would_replace_the_file_of_the_verdicts_is_refused(
    page: str, block: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- verdicts -->\n<!-- /verdicts -->\nafter\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.md").symlink_to("README.md")
    (tmp_path / "linked").symlink_to(".")
    (tmp_path / "hard.md").hardlink_to(file)
    words = ["ablate", "--table", "docs/ablation.parquet", "--page", f"{tmp_path}/{page}"]
    refused([*words, "--block", f"{tmp_path}/{block}"], "--page", "--block", "name another")


@pytest.mark.parametrize("words", [["--page", "TABLE"], ["--page", "./TABLE"], []])
def test_a_page_that_would_replace_the_table_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    name = "table.parquet" if words else "table.md"  # without --page it is the table's name with .md
    shutil.copy("docs/ablation.parquet", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    refused(["ablate", "--table", name, *(word.replace("TABLE", name) for word in words)], name, "is the table")


@pytest.mark.parametrize("page", ["out/ablation.parquet", "./out/../out/ablation.parquet", "linked/ablation.parquet"])
def test_a_page_in_the_place_of_the_table_to_be_is_refused_before_a_study_runs(
    page: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "linked").symlink_to("out")
    study = "configs/ablation/david.yaml"
    refused(["ablate", study, "--quick", "--out", f"{tmp_path}/out", "--page", f"{tmp_path}/{page}"], "is the table")
    assert not (tmp_path / "out").exists()


def test_verdicts_are_renewed_from_a_finished_table_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(["ablate", "--out", str(tmp_path / "out"), "--block", "README.md"], "--block", "--table")
