"""A list of windows that is killed at any boundary goes on to the files of one that was left alone."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fast.killed import MOMENTS, SHARDS

ROOT = Path(__file__).parent.parent.parent
CLOCKS = {"seconds", "samples_per_second", "window_seconds", "data_wait_seconds", "bookkeeping_seconds"}
CLOCKS |= {"memory_gib", "paused_seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tests.fast.killed` fills."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "stamps")}
    command = [sys.executable, "-m", "tests.fast.killed", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, Any]:
    ends: dict[str, Any] = json.loads((folder / "ends.json").read_text())
    return ends


def contents(run: Path) -> dict[str, str]:
    """Every file of the students, with its sha256; journals without what a clock or the memory gave."""
    files = {}
    for path in sorted((run / "fast").rglob("*")):
        if path.suffix == ".jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            kept = [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
            files[str(path.relative_to(run))] = json.dumps(kept)
        elif path.is_file() and "tensorboard" not in path.parts and path.name != "config.yaml":  # names the run folder
            files[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


@pytest.mark.parametrize("moment", SHARDS)
def test_a_cache_with_landings_is_never_half_done(ends: dict[str, Any], moment: str) -> None:
    assert (ends["cache"], ends[moment], ends["cache, killed"]) == (0, -9, 0)
    assert ends[f"half done before {moment}"] == []
    assert ends["same cache"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_each_kill_comes_where_it_should(ends: dict[str, Any], moment: str) -> None:
    assert (ends["distill"], ends[moment]) == (0, -9)


def test_killed_students_are_those_of_a_run_left_alone(folder: Path, ends: dict[str, Any]) -> None:
    assert (ends["whole"], ends["killed"]) == (0, 0)
    whole, killed = (contents(folder / name / "run") for name in ("whole", "killed"))
    assert {name for name in whole if name.endswith("COMPLETE")} == {f"fast/{n}/COMPLETE" for n in (4, 2, 1)}
    assert {name for name in whole | killed if whole.get(name) != killed.get(name)} == set()


def test_two_processes_train_the_same_students_but_for_rounding(folder: Path, ends: dict[str, Any]) -> None:
    assert ends["shared"] == 0
    for windows in (4, 2, 1):
        one, two = (
            load_file(folder / name / f"run/fast/{windows}/checkpoints/000000020/student.safetensors")
            for name in ("whole", "shared")
        )
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)


def test_a_finished_list_is_left_as_it_is(folder: Path, ends: dict[str, Any]) -> None:
    assert ends["again"] == 0
    assert contents(folder / "whole" / "run") == contents(folder / "killed" / "run")
