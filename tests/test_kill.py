"""kill -9 in the middle of caching loses nothing: the next call ends on the bytes of a run that was never stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "stages", "cache-teacher", "--config", "configs/tiny.yaml", "--count", "240"]
COMMAND += ["--validation-count", "2", "--render.records-per-shard", "20", "--render.states.steps", "4"]


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
