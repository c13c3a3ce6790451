"""A v teacher of a single file without a label goes through caching and distillation to an export that samples."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from configs.load import load
from shards.manifest import Manifest
from stages import cache_teacher, distill
from stages.cache.audit import audit_record, load_recorded_teacher, sample
from stages.nets.run_folder import load_run_teacher, open_run
from stages.sampling.models import load_model
from tests.single_files import ldm_tensors, saved
from tests.test_other_schedules import DAVID, FEW, SHORT, TINY
from tests.v_teachers import EMBEDDED


@pytest.mark.parametrize(("name", "tail"), [("v", "hold"), ("v, zero terminal SNR", "faithful")])
def test_a_v_teacher_of_a_single_file_goes_to_the_end(
    name: str, tail: str, teachers_by_prediction: Mapping[str, Path], tmp_path: Path
) -> None:
    file = saved(tmp_path / "model.safetensors", ldm_tensors(teachers_by_prediction[name]))
    run = tmp_path / "run"
    place = ["--run", str(run), "--teacher", str(file), "--teacher.config", str(EMBEDDED)]
    cache_teacher.run(load(cache_teacher.Config, "cache_teacher", TINY, [*place, *FEW, "--render.tail", tail]))

    manifest = Manifest.open(run / "cache")
    recorded = manifest.recipe.information["teacher_source"]
    again = load_recorded_teacher(manifest, cache_teacher.TeacherSource.model_validate(recorded), torch.device("cpu"))
    assert again.components.schedule.prediction_type == "v_prediction"
    assert again.components.schedule.has_zero_terminal_snr == (name != "v")
    for shard, record in sample(run / "cache", manifest, 3, 0):
        assert record.states.v_cond.isfinite().all()
        assert audit_record(again, record, shard, tf32=False).worst().error_ratio <= 1

    distill.run(load(distill.Config, "distill", TINY, ["--run", str(run), *SHORT, *DAVID]))
    origin = open_run(run / "distill").origin
    teacher = load_run_teacher(origin, torch.device("cpu"), torch.float32)
    assert torch.equal(teacher.schedule.alpha_bar, again.components.schedule.alpha_bar)
    scheduler = json.loads((run / "distill/export/diffusers/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "flow_prediction"
    assert load_model(str(run / "distill"), "cpu").metadata["checkpoint"] == 4
