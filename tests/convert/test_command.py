"""A conversion ends in an ordinary run, the same after any kill, and a finished one is left as it is."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages import export
from stages.convert.base import open_base
from stages.convert.results import START_FILE, VERDICT_FILE
from stages.convert.starts import Probe
from stages.convert.stored import read_result
from stages.convert.verdict import Verdict
from stages.evaluate.recorded_prompts import recorded_prompts
from stages.export.history import read_history
from stages.nets.run_folder import Origin, open_run
from stages.upkeep import find_origin
from tests.convert.runs import GOLDEN, MOMENTS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tests.convert.runs` fills."""
    folder = tmp_path_factory.mktemp("conversions")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "stamps")}
    command = [sys.executable, "-m", "tests.convert.runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def ends(runs: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((runs / "ends.json").read_text())
    return content


def digests(run: Path) -> dict[str, str]:
    """What a conversion leaves, but for times and speeds."""
    patterns = ("cache/data/*", "cache/manifest.json", "distill/*.json", "distill/COMPLETE", "distill/grids/*")
    patterns += ("distill/checkpoints/*/ema.safetensors", "distill/export/**/*")
    files = {file for pattern in patterns for file in run.glob(pattern) if file.is_file()}
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_conversion_that_was_killed_at_every_boundary_ends_in_the_bytes_of_one_that_was_not(runs: Path) -> None:
    assert {moment: ends(runs)[moment] for moment in MOMENTS} == dict.fromkeys(MOMENTS, -9)
    assert ends(runs)["whole"] == ends(runs)["killed"] == 0
    whole, killed = digests(runs / "whole"), digests(runs / "killed")
    assert killed == whole
    assert {"distill/start.json", "distill/convert.json", "distill/origin.json"} < whole.keys()
    assert sum(name.endswith("ema.safetensors") for name in whole) == 2
    assert any(name.startswith("distill/export/diffusers/unet/") for name in whole)


def test_a_finished_conversion_is_left_as_it_is_and_refuses_other_settings(runs: Path) -> None:
    assert ends(runs)["again"] == 0
    assert f"{runs / 'whole'} is complete: nothing to do" in (runs / "printed.txt").read_text()
    assert ends(runs)["other settings"] == 2


def test_the_gate_ends_the_polish_at_the_first_checkpoint_that_passes_also_after_a_signal_there(runs: Path) -> None:
    assert ends(runs)["gate, stopped"] == 143
    assert ends(runs)["gate"] == 0
    assert (runs / "gated" / "distill" / "COMPLETE").read_text() == "8\n"
    assert (runs / "whole" / "distill" / "COMPLETE").read_text() == "20\n"


def test_the_run_of_a_conversion_is_an_ordinary_run(runs: Path) -> None:
    whole = runs / "whole"
    saved = open_run(whole / "distill")
    assert saved.samples == 20
    assert export.run(export.Config(run=saved.folder, verify=True))
    assert find_origin(whole / "cache").teacher_location() == str(runs / "fine-tune")
    again = open_base(whole)
    assert again.weights == saved.weights
    assert recorded_prompts(again).source == "grammar"


def test_the_export_is_neither_the_base_nor_the_fine_tune_and_its_example_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs / "whole" / "distill" / "export" / "diffusers"
    file = "diffusion_pytorch_model.safetensors"
    exported = load_file(next((folder / "unet").glob("*.safetensors")))
    fine_tune = load_file(runs / "fine-tune" / "unet" / file)
    base = {
        name.removeprefix("unet."): value for name, value in load_file(open_run(GOLDEN / "distill").weights).items()
    }
    assert exported.keys() == fine_tune.keys() == base.keys()
    for other in (fine_tune, base):
        assert any(not torch.equal(value, other[name].to(value.dtype)) for name, value in exported.items())
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert len(scope["pipeline"].unet.state_dict()) == len(exported)


def test_a_conversion_remembers_its_base_and_shows_its_verdict(runs: Path) -> None:
    folder = runs / "whole" / "distill"
    probe, verdict = read_result(Probe, folder / START_FILE), read_result(Verdict, folder / VERDICT_FILE)
    assert probe.errors.keys() == {"base", "delta", "graft"}
    assert verdict.errors.keys() == {"base", "delta", "graft", "polished"}
    base = Origin.open(folder).base
    assert base is not None
    assert base["start"] == probe.best
    assert base["samples"] == 8
    card = (folder / "export" / "diffusers" / "README.md").read_text()
    for name, errors in verdict.errors.items():
        assert f"| {name} | 2 | {errors[1].student:.4f} |" in card
    assert str(runs) not in card
    assert str(ROOT) not in card
    history = read_history(folder, 8)
    assert history is not None
    assert not history.conversion  # measured of the checkpoint at 20
