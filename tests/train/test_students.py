"""Runs of students that are no whole copies of their teacher: resume, loading, David, and what is refused of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import load
from shards.reader import Reader
from stages import __main__ as cli
from stages import distill
from stages.nets.run_folder import load_run_teacher, load_student, open_run
from stages.train.journal import read_step_lines
from tests.train.test_david import FEW, FIT, TINY, TRAIN

CONFIG = ["--config", "configs/tiny.yaml"]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "made"
    assert cli.main(["cache-teacher", *CONFIG, "--run", str(folder), *FEW]) == 0
    return folder


def train(made: Path, into: Path, *options: str) -> Path:
    """A run on the same cache."""
    (into / "cache").parent.mkdir(parents=True, exist_ok=True)
    if not (into / "cache").exists():
        shutil.copytree(made / "cache", into / "cache")
    distill.run(load(distill.Config, "distill", TINY, ["--run", str(into), *TRAIN, *FIT, *options]))
    return into / "distill"


@pytest.fixture(scope="module")
def tiny(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned student, with David."""
    return train(made, tmp_path_factory.mktemp("tiny"), "--student.prune", "tiny")


def weights(run: Path, samples: int) -> bytes:
    return (run / "checkpoints" / f"{samples:09d}" / "ema.safetensors").read_bytes()


def test_a_pruned_run_goes_on_to_the_same_bits(tiny: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "distill")
    shutil.rmtree(tmp_path / "distill/export")
    (tmp_path / "distill/COMPLETE").unlink()
    for samples in (16, 24):
        shutil.rmtree(tmp_path / f"distill/checkpoints/{samples:09d}")
    again = train(made, tmp_path, "--student.prune", "tiny")
    assert weights(again, 24) == weights(tiny, 24)


def test_its_run_folder_tells_its_shape_and_is_loaded_by_it(tiny: Path) -> None:
    saved = open_run(tiny)
    assert (saved.origin.prune, saved.origin.scratch) == ("tiny", False)
    student = load_student(saved, load_run_teacher(saved.origin, torch.device("cpu"), torch.float32))
    assert student.blocks == ("down_1", "up_0", "up_1", "up_2", "up_3")
    facts = json.loads((tiny / "export/diffusers/sollune.json").read_text())
    assert (facts["prune"], facts["fits_ldm"]) == ("tiny", False)


def test_blocks_that_are_gone_have_no_term_no_lambda_and_no_david(tiny: Path) -> None:
    blocks = ["down_1", "up_0", "up_1", "up_2", "up_3"]
    for line in read_step_lines(tiny):
        assert [*line["blocks"]] == [*line["lambdas"]] == blocks
    identity = json.loads((tiny / "david/config.json").read_text())["identity"]["identity"]
    assert [*identity["blocks"]] == blocks


def test_a_run_of_another_student_is_refused_and_one_without_settings_as_before(
    tiny: Path, made: Path, tmp_path: Path
) -> None:
    stored = json.loads((tiny / "checkpoints/000000024/state.json").read_text())["identity"]
    assert stored["student"] == {"prune": "tiny", "scratch": False}
    whole = train(made, tmp_path, "--david.fusion.formula", "static", "--train.max-samples", "4")
    stored = json.loads((whole / "checkpoints/000000004/state.json").read_text())["identity"]
    assert "student" not in stored
    assert stored["graft"] is True
    assert "velocity_target" not in stored["objective"]


def test_students_from_scratch_differ_by_their_seed_and_end_otherwise_than_the_graft(
    made: Path, tmp_path: Path
) -> None:
    few = ("--david.fusion.formula", "static", "--train.max-samples", "4", "--student.scratch", "true")
    runs = [train(made, tmp_path / str(seed), *few, "--train.seed", str(seed)) for seed in (0, 1)]
    assert weights(runs[0], 4) != weights(runs[1], 4)
    assert open_run(runs[0]).origin.scratch
    assert "random weights" in (runs[0] / "export/diffusers/README.md").read_text()


def test_the_data_target_trains_on_the_cached_pictures(made: Path, tmp_path: Path) -> None:
    few = ("--david.fusion.formula", "static", "--train.max-samples", "4")
    data = train(made, tmp_path / "data", *few, "--objective.velocity-target", "data")
    stored = json.loads((data / "checkpoints/000000004/state.json").read_text())["identity"]
    assert stored["objective"]["velocity_target"] == "data"
    assert weights(data, 4) != weights(train(made, tmp_path / "teacher", *few), 4)


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_rows_have_the_pictures_of_their_records(made: Path, budget: int) -> None:
    reader = Reader(made / "cache", batch_size=7, x0=True, memory_budget_bytes=budget, workers=0)
    batch = reader.batch(np.arange(7))
    assert batch.x0 is not None
    records = {record.key: record for record in reader.records()}
    assert all(torch.equal(x0, records[key].x0) for key, x0 in zip(batch.keys, batch.x0, strict=True))
    assert Reader(made / "cache", batch_size=7, memory_budget_bytes=budget).batch(np.arange(7)).x0 is None
