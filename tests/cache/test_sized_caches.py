"""Laws of a whole cache of several sizes: growth, ranges, repair, audit and plan, by the commands themselves."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.load import load
from shards.manifest import Manifest
from shards.reader import Reader
from stages import __main__ as cli
from stages import cache_teacher
from stages.cache.sizes import RenderSizes
from tests.cache_checks import open_verified

SIZES = "[{size: 64x64, share: 2}, {size: 64x96, share: 1}, {size: 96x64, share: 1}]"
FEW = ["--validation-count", "5", "--render.records-per-shard", "4", "--render.batch-size", "4"]
FEW += ["--render.states.steps", "3", "--render.states.trajectory-states", "2", "--render.states.renoised-states", "1"]


def config(run: Path, *options: str) -> cache_teacher.Config:
    words = ["--run", str(run), "--render.sizes", SIZES, *FEW, "--count", "20", *options]
    return load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], words)


def made(run: Path, *options: str) -> Path:
    cache_teacher.run(config(run, *options))
    return run / "cache"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "whole")


def shards(cache: Path) -> dict[str, str]:
    return {shard.file: shard.sha256 for shard in open_verified(cache).shards}


def test_each_shard_holds_one_size_and_the_splits_hold_every_prompt_once(cache: Path) -> None:
    manifest = open_verified(cache)
    for shard in manifest.shards:
        assert f"-{shard.size}-" in shard.file
    sizes = RenderSizes(manifest.shards[0].size, config(cache.parent).render.sizes)
    for split, count in (("train", 20), ("validation", 5)):
        reader = Reader(cache, split)
        records = list(reader.records())
        assert sorted(int(record.key) for record in records) == list(range(count))
        assert all(record.size == sizes.size_of(record) for record in records), "by the seed of the prompt alone"
    assert len(manifest.sizes_of("train")) == 3


def test_a_cache_that_grows_is_the_one_that_is_made_at_once(cache: Path, tmp_path: Path) -> None:
    grown = made(tmp_path / "grown", "--count", "9")
    before = shards(grown)
    assert shards(made(tmp_path / "grown")) == shards(cache)
    assert set(before) <= set(shards(cache))


def test_ranges_of_shards_make_the_same_cache(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "parts", "--shard-range", "0:3")
    assert "are still missing" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "cache" / "COMPLETE").exists()
    assert shards(made(tmp_path / "parts", "--shard-range", f"3:{len(shards(cache))}")) == shards(cache)
    assert (tmp_path / "parts" / "cache" / "COMPLETE").exists()


def test_a_damaged_shard_of_a_size_is_made_again(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache.parent, tmp_path / "run")
    damaged = next(path for path in (tmp_path / "run" / "cache" / "data").iterdir() if "64x96" in path.name)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert cli.main(["shards", "repair", str(tmp_path / "run")]) == 0
    assert shards(tmp_path / "run" / "cache") == shards(cache)


def test_an_audit_tells_the_errors_of_each_size(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", "verify", str(cache), "--deep", "--sample", "25"]) == 0
    printed = capsys.readouterr().out
    manifest = Manifest.open(cache)
    for size in manifest.sizes_of():
        states = sum(manifest.totals(split, size).states for split in ("train", "validation"))
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{size} ")]
        assert int(line.split()[1]) == states


def plan_lines(text: str) -> Sequence[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith("at ")]


def test_a_plan_has_a_line_for_each_size_and_the_bytes_of_all(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "run", "--plan")
    printed = capsys.readouterr().out
    assert not (tmp_path / "run" / "cache" / "data").exists()
    by_size = {words[1]: (int(words[2]), int(words[4].replace(",", ""))) for words in plan_lines(printed)}
    total = next(line for line in printed.splitlines() if line.startswith("bytes"))
    assert int(total.split()[1].replace(",", "")) == sum(stored for _, stored in by_size.values())
    manifest = Manifest.open(cache)
    for size in manifest.sizes_of():
        both = [manifest.totals(split, size) for split in ("train", "validation")]
        prompts, stored = by_size[str(size)]
        assert prompts == sum(one.records for one in both)
        assert stored == pytest.approx(sum(one.bytes for one in both), rel=0.3)  # with the rows of the table


def test_a_finished_cache_is_left_as_it_is(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (cache / "data").iterdir()}
    made(cache.parent)
    assert "0 shards made" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (cache / "data").iterdir()} == before
