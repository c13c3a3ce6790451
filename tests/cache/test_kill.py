"""kill -9 in the middle of caching loses nothing: the next call ends on the bytes of a run that was never stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from benchmarks.killing import (
    fill_small_cache,
    fork_job,
    incomplete_files,
    kill_after,
    kill_before_step,
    read_files,
    wait_for_exit,
)
from stages.cache import claims

COMMAND = [sys.executable, "-m", "stages", "cache-teacher", "--config", "configs/tiny.yaml", "--count", "120"]
COMMAND += ["--validation-count", "2", "--render.records-per-shard", "10", "--render.states.steps", "4"]


def tars(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "cache" / "data").glob("*.tar")}


def test_a_killed_cache_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    job = subprocess.Popen([*COMMAND, "--run", str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("cache/data/train-*.tar"))) < 2 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    finished = tars(killed)
    assert 2 <= len(finished) < 13
    assert not (killed / "cache" / "COMPLETE").exists()

    for run in (killed, whole):
        subprocess.run([*COMMAND, "--run", str(run)], check=True, stderr=subprocess.DEVNULL)
    assert not list((killed / "cache").rglob("*.partial"))
    assert tars(killed) == tars(whole)
    assert finished.items() <= tars(killed).items()
    manifest = Path("cache/manifest.json")
    assert (killed / manifest).read_bytes() == (whole / manifest).read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> tuple[dict[str, bytes], float]:
    """What an uninterrupted job leaves, and the seconds that it takes."""
    began = time.monotonic()
    assert wait_for_exit(fork_job(lambda: fill_small_cache(tmp_path / "whole"))) == 0
    return read_files(tmp_path / "whole"), time.monotonic() - began


def goes_on(cache: Path, prompts: int = 8) -> dict[str, bytes]:
    """What the job leaves when it is begun again; nothing hidden stays behind."""
    assert wait_for_exit(fork_job(lambda: fill_small_cache(cache, prompts))) == 0
    assert not list(cache.rglob(".*"))
    return read_files(cache)


def test_kills_at_five_random_moments_lose_nothing_in_separate_folders_and_in_one(
    tmp_path: Path, whole: tuple[dict[str, bytes], float]
) -> None:
    expected, seconds = whole
    rng, one_folder = Random(0), tmp_path / "one"
    killed = 0
    for moment in (rng.uniform(0, seconds) for _ in range(5)):
        cache = tmp_path / f"{moment}"
        killed += kill_after(lambda cache=cache: fill_small_cache(cache), moment)  # type: ignore[misc]
        kill_after(lambda: fill_small_cache(one_folder), moment)
        assert incomplete_files(cache, expected) == incomplete_files(one_folder, expected) == []
        assert goes_on(cache) == expected
    assert killed >= 1  # a moment may be after the end
    assert goes_on(one_folder) == expected


def test_a_kill_before_any_step_on_the_disk_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.1)  # how long an unsigned claim is respected
    assert wait_for_exit(fork_job(lambda: fill_small_cache(tmp_path / "whole", 4))) == 0
    expected = read_files(tmp_path / "whole")
    met: set[str] = set()
    for step in (15, 47, *range(5, 190, 11)):  # a manifest and the last one; records, journal, table
        cache = tmp_path / f"killed{step}"
        if not kill_before_step(lambda cache=cache: fill_small_cache(cache, 4), step):  # type: ignore[misc]
            break
        met |= {path.name.split(".")[1] for path in cache.rglob(".*.partial")}
        assert incomplete_files(cache, expected) == []
        assert goes_on(cache, 4) == expected
    assert {"table", "manifest"} <= met
