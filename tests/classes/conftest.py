"""The run of the evaluation's tests, with what the `classes` commands read of it besides."""

import shutil
from pathlib import Path

import pytest
import yaml

from shards.table import write_table
from tests.evaluate.conftest import run_folder, student, teacher, teacher_folder

__all__ = ["run_folder", "student", "teacher", "teacher_folder"]

SENTENCES = [
    f"shape/{shape}\ta {size} {colour} {shape} at the {place}"
    for shape in ("star", "ring")
    for size in ("small", "large")
    for colour in ("red", "blue", "green", "pink", "brown", "lime")
    for place in ("left", "right", "top", "bottom", "middle")
]


@pytest.fixture(scope="package")
def distill_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/distill of a run whose cache has its table, with the configuration it was made by."""
    runs = tmp_path_factory.mktemp("classes")
    shutil.copytree(run_folder.parent, runs, dirs_exist_ok=True)
    write_table(runs / "cache")
    (runs / "distill" / "config.yaml").write_text("distill: {}\n")
    return runs / "distill"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration whose sentences are of the run's classes."""
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    prompts = {"source": "file", "path": str(tmp_path / "prompts.txt")}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"evaluate": {"prompts": prompts}, "finetune_classes": {"prompts": prompts, "count": 12}})
    )
    return path
