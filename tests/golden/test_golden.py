"""What earlier versions stored is read by this one: a cache, a run, its export and the pictures of classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.__main__ import main
from tests.golden.make import COMMON, DAVID, TRAIN

DATA = Path("tests/golden/data")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The golden cache and run as one run folder, stopped at 8 of 12 samples."""
    shutil.copytree(DATA / "cache", tmp_path / "cache")
    shutil.copytree(DATA / "distill", tmp_path / "distill")
    (tmp_path / "distill" / "COMPLETE").unlink()
    return tmp_path


def lines(folder: Path) -> dict[int, dict[str, object]]:
    """The journal's lines on training, by their samples."""
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return {line["samples"]: line for line in journal if "kind" not in line}


@pytest.mark.parametrize("folder", ["cache", "classes/cache"])
def test_an_earlier_cache_is_whole(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", str(DATA / folder)]) == 0
    assert capsys.readouterr().out.endswith("ok\n")


def test_an_earlier_run_goes_on_to_what_it_reached_then(run: Path) -> None:
    assert main(["distill", *COMMON, "--run", str(run), *TRAIN, *DAVID]) == 0
    then, now = lines(DATA / "distill")[12], lines(run / "distill")[12]
    assert now.keys() == then.keys()
    for name in ("loss", "flow", "guidance", "block_term", "grad_norm", "lambdas"):
        assert now[name] == pytest.approx(then[name], rel=1e-2)
    unet = Path("export", "diffusers", "unet", "diffusion_pytorch_model.safetensors")
    stored = load_file(DATA / "distill" / unet)
    for name, value in load_file(run / "distill" / unet).items():
        torch.testing.assert_close(value, stored[name], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("model", ["diffusers", "teacher-flow.safetensors"])
def test_an_earlier_export_gives_pictures(tmp_path: Path, model: str) -> None:
    sheet = tmp_path / "sheet.png"
    words = ["a red star", "--seeds", "0", "--steps", "2", "--out", str(sheet)]
    assert main(["sample", str(DATA / "distill" / "export" / model), *words]) == 0
    assert sheet.is_file()
