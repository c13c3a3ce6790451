"""Laws of the cost estimate, and of a disk that fills before or while a cache is made."""

from collections import namedtuple
from pathlib import Path

import pytest

from configs.load import load
from shards.manifest import Manifest
from stages import cache_teacher
from stages.cache import plan
from stages.system.refusal import Refused

FEW = ["--count", "20", "--validation-count", "2", "--render.records-per-shard", "10", "--render.states.steps", "4"]
Usage = namedtuple("Usage", "total used free")


def config(run: Path, *options: str) -> cache_teacher.Config:
    words = ["--run", str(run), *FEW, "--render.batch-size", "10", *options]
    return load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], words)


def printed_number(text: str, name: str) -> int:
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[-3].replace(",", ""))


def test_the_estimated_bytes_are_the_bytes_that_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_teacher.run(config(tmp_path, "--plan"))
    planned = printed_number(capsys.readouterr().out, "bytes")
    assert not (tmp_path / "cache" / "data").exists()
    cache_teacher.run(config(tmp_path))
    written = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert planned == pytest.approx(written, rel=0.15)


def test_a_finished_cache_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_teacher.run(config(tmp_path))
    cache_teacher.run(config(tmp_path, "--plan"))
    assert "prompts to make  0 " in capsys.readouterr().out


def test_a_disk_that_cannot_hold_it_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, plan.MARGIN_BYTES + 100_000))
    with pytest.raises(Refused, match=r"cache: 16 MiB free, .* are needed - free some space"):
        cache_teacher.run(config(tmp_path))
    assert not list(tmp_path.rglob("*.tar"))
    cache_teacher.run(config(tmp_path, "--no-disk-check", "true"))


def test_a_disk_that_fills_stops_the_job_between_shards_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1 << 40, 1 << 40, plan.MARGIN_BYTES])
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: Usage(0, 0, next(left)))
        with pytest.raises(Refused, match="MiB are needed"):
            cache_teacher.run(config(tmp_path))
    assert [shard.records for shard in Manifest.open(tmp_path / "cache").shards] == [10]
    assert not list(tmp_path.rglob("*.partial"))
    cache_teacher.run(config(tmp_path))
    assert [shard.records for shard in Manifest.open(tmp_path / "cache").shards] == [10, 10, 2]


def test_the_last_worker_to_end_decides_how_long_it_takes() -> None:
    assert plan.longest_share([250, 250, 50, 100], 1) == 650
    assert plan.longest_share([250, 250, 50, 100], 2) == 350
    assert plan.longest_share([250, 250, 50, 100], 8) == 250
    assert plan.longest_share([], 2) == 0


def test_only_the_shards_of_the_range_are_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_teacher.run(config(tmp_path, "--plan", "--shard-range", "1:3", "--workers", "2"))
    printed = capsys.readouterr().out
    assert "prompts to make  12 (72 states)" in printed
    assert "each of 2 workers" in printed
