"""Teachers of other than 1000 steps: cached, fitted by David in all of its bins, and distilled."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.load import load
from shards.manifest import Manifest
from shards.reader import Reader
from shards.table import Table
from stages import cache_teacher, distill
from stages.cache.audit import audit_record, load_recorded_teacher, sample
from stages.david.patterns import BlockStates
from stages.nets.run_folder import open_run

TINY = [Path("configs/tiny.yaml")]
FEW = ["--count", "12", "--validation-count", "4", "--render.records-per-shard", "6", "--render.states.steps", "6"]
SHORT = ["--train.max-samples", "4", "--train.batch-size", "4", "--train.checkpoint-every-samples", "4"]
SHORT += ["--train.optimizer.warmup-samples", "4", "--validation.states", "4", "--grid.sampler.steps", "2"]
DAVID = ["--david.fit.steps", "2", "--david.fit.bins", "10", "--david.fit.patterns", "4"]


def teacher_with(folder: Path, steps: int) -> Path:
    """The embedded teacher, with its schedule in another number of steps."""
    shutil.copytree("stages/tiny/model", folder)
    path = folder / "scheduler" / "scheduler_config.json"
    betas = {"beta_start": 0.85 / steps, "beta_end": 12 / steps}
    path.write_text(json.dumps({**json.loads(path.read_text()), **betas, "num_train_timesteps": steps}))
    return folder


@pytest.mark.parametrize(("steps", "dtype"), [(200, "float32"), (4000, "float32"), (4000, "float16")])
def test_a_teacher_of_other_than_a_thousand_steps_is_cached_and_distilled(
    tmp_path: Path, steps: int, dtype: str
) -> None:
    teacher = teacher_with(tmp_path / "teacher", steps)
    run = tmp_path / "run"
    place = ["--run", str(run), "--teacher", str(teacher)]
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", TINY, [*place, *FEW, "--dtype", dtype]))

    table = Table.open(run / "cache")
    rows = table.rows("train")
    states = BlockStates.from_table(table, "mid", rows, 10, steps)
    assert int(table.k[rows].max()) == steps - 1
    assert sorted({0, 9} & set(states.bins.tolist())) == [0, 9]
    torch.testing.assert_close(states.bins, (10 * torch.from_numpy(table.k[rows]) // steps))

    manifest = Manifest.open(run / "cache")
    again = load_recorded_teacher(manifest, str(teacher), torch.device("cpu"))
    for file, record in sample(run / "cache", manifest, 3, 0):
        assert audit_record(again, record, file, tf32=False).worst().error_ratio <= 1

    if dtype == "float32":
        distill.run(load(distill.Config, "distill", TINY, [*place, *SHORT, *DAVID]))
        assert json.loads((run / "distill/david/config.json").read_text())["steps"] == steps
        assert open_run(run / "distill").samples == 4
        assert len(Reader(run / "cache").timesteps_of_sizes[0]) == 12 * 6
