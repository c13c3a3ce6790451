"""What earlier versions stored is read by this one: a cache, a run, its export and the pictures of classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shards.manifest import Manifest
from stages.__main__ import main
from tests.golden.make import CACHE, COMMON, DAVID, TRAIN

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


@pytest.mark.parametrize("sizes", [[], ["--render.sizes", "[{size: 64x64, share: 3}]"]])
def test_an_earlier_cache_grows_in_the_schema_that_it_has(tmp_path: Path, sizes: list[str]) -> None:
    shutil.copytree(DATA / "cache", tmp_path / "cache")
    before = Manifest.open(tmp_path / "cache")
    words = ["cache-teacher", *COMMON, "--run", str(tmp_path), "--teacher", str(DATA / "teacher"), *CACHE]
    assert main([*words, *sizes, "--count", "10"]) == 0
    after = Manifest.open(tmp_path / "cache")
    assert after.schema_version == before.schema_version == 1
    assert after.recipe.fingerprint() == before.recipe.fingerprint()
    assert set(before.shards) < set(after.shards)
    assert sum(shard.records for shard in after.shards_of("train")) == 10
    assert main(["shards", "verify", str(tmp_path)]) == 0


def test_an_earlier_cache_takes_no_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(DATA / "cache", tmp_path / "cache")
    words = ["cache-teacher", *COMMON, "--run", str(tmp_path), "--teacher", str(DATA / "teacher"), *CACHE]
    assert main([*words, "--render.sizes", "[{size: 64x64, share: 1}, {size: 64x96, share: 1}]"]) == 2
    assert "made by another recipe: render.sizes.0.size was absent" in capsys.readouterr().err
