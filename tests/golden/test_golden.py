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
SCHEMA_2 = Path("tests/golden/schema_2")
"""A cache of two sizes by the same teacher, made at dd9b603, before records had landings."""


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


@pytest.mark.parametrize("folder", [DATA / "cache", DATA / "classes/cache", SCHEMA_2])
def test_an_earlier_cache_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", str(folder)]) == 0
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
    sizes = ["--render.sizes", "[{size: 64x64, share: 1}, {size: 64x96, share: 1}]"]
    assert main([*words, *sizes]) == 2
    assert "made by another recipe: render.sizes.0.size was absent" in capsys.readouterr().err


SIZED = ["--render.records-per-shard", "4", "--render.states.steps", "4"]
SIZED += ["--render.sizes", "[{size: 64x64, share: 1}, {size: 64x96, share: 1}]"]


def test_a_cache_of_schema_2_grows_without_landings_and_keeps_its_recipe(tmp_path: Path) -> None:
    shutil.copytree(SCHEMA_2 / "cache", tmp_path / "cache")
    before = Manifest.open(tmp_path / "cache")
    words = ["cache-teacher", *COMMON, "--run", str(tmp_path), "--teacher", str(DATA / "teacher"), *SIZED]
    assert main([*words, "--count", "9", "--validation-count", "1"]) == 0
    after = Manifest.open(tmp_path / "cache")
    assert after.schema_version == before.schema_version == 2
    assert after.recipe.fingerprint() == before.recipe.fingerprint()
    assert sum(shard.records for shard in after.shards_of("train")) == 9
    assert main(["shards", "verify", str(tmp_path)]) == 0


def test_a_cache_of_schema_2_is_repaired_by_the_settings_that_lie_beside_it(tmp_path: Path) -> None:
    """They name no windows, of which there were none."""
    shutil.copytree(SCHEMA_2, tmp_path / "run")
    shard = tmp_path / "run" / "cache" / "data" / "train-64x64-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2000])
    assert main(["shards", "repair", str(tmp_path / "run"), "--teacher", str(DATA / "teacher")]) == 0
    again = Manifest.open(tmp_path / "run" / "cache")
    assert (again.schema_version, again.recipe.fingerprint()) == (
        2,
        Manifest.open(SCHEMA_2 / "cache").recipe.fingerprint(),
    )
    assert len(shard.read_bytes()) == len(whole)


def test_an_earlier_cache_goes_on_without_landings_and_takes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, more in ((DATA, CACHE), (SCHEMA_2, [*SIZED, "--count", "4", "--validation-count", "1"])):
        run = tmp_path / data.name
        shutil.copytree(data / "cache", run / "cache")
        before = Manifest.open(run / "cache").recipe
        words = ["cache-teacher", *COMMON, "--run", str(run), "--teacher", str(DATA / "teacher"), *more]
        assert main(words) == 0
        assert Manifest.open(run / "cache").recipe.fingerprint() == before.fingerprint()
        assert main([*words, "--render.states.windows", "4"]) == 2
        message = capsys.readouterr().err
        assert f"{run / 'cache'}: render.states.windows is 4, its records were made with 0 - " in message
        assert "--render.states.windows 0" in message
