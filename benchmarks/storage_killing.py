"""Killing the process that works in a bucket, and going on elsewhere: `python benchmarks/storage_killing.py OUT`.

A cache and a run of the embedded teacher are made in files of this machine, and then in s3:// (moto's server, a process
of its own on loopback) with a share of the requests failing. There each command is killed with SIGKILL while it sends
one of its objects, which arrives or is lost by turns, and called again with another, empty local folder (or the same
one with --same-machine), until it ends.
Shards, weights, averages and optimizer must be the bytes of the local ones. OUT/storage_killing.json holds it all.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "storage")]

from s3_server import FaultyProxy, faulty_proxy, s3_server  # noqa: E402

from stages.system.storage.locations import Location  # noqa: E402
from stages.system.storage.object_store import store_of  # noqa: E402

CACHE = (
    "cache-teacher", "--config", "configs/tiny.yaml", "--count", "12", "--validation-count", "2",
    "--render.records-per-shard", "4", "--render.states.steps", "4",
)  # fmt: skip
TRAIN = (
    "distill", "--config", "configs/tiny.yaml", "--train.max-samples", "32", "--train.checkpoint-every-samples", "8",
    "--train.batch-size", "4", "--david.fusion.formula", "static", "--validation.states", "6",
    "--grid.sampler.steps", "2",
)  # fmt: skip
LAST = "distill/checkpoints/000000032"
COMPARED = ("student.safetensors", "ema.safetensors", "optimizer.pt")
TIMEOUT_SECONDS = 300


@dataclass
class Kill:
    """End a process at the `number`-th object whose path holds `part`, before or after it is stored."""

    part: str
    number: int
    is_stored: bool
    path: str | None = None
    """of the object, when it happened"""


def run(arguments: Sequence[str], place: str, storage: Path, proxy: FaultyProxy | None, kill: Kill | None) -> int:
    """Call a command with a folder of its own, and kill it as `kill` says; returns how it ended."""
    environment = {**os.environ, "SOLLUNE_STORAGE": str(storage)}
    command = [sys.executable, "-m", "stages", *arguments, "--run", place]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    count = 0

    def on_request(method: str, path: str) -> bool:
        nonlocal count
        if kill is None or kill.path is not None or method != "PUT" or kill.part not in path:
            return True
        count += 1
        if count < kill.number:
            return True
        kill.path = path.partition("?")[0]
        process.send_signal(signal.SIGKILL)
        return kill.is_stored

    if proxy is not None:
        proxy.on_request = on_request
    try:
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{errors.decode()}")
    return process.returncode


def until_done(
    arguments: Sequence[str], place: Location, folder: Path, proxy: FaultyProxy, kills: Sequence[Kill], is_same: bool
) -> list[dict[str, Any]]:
    """Call a command until it ends, on the same machine or on empty ones; the last time it is left alone."""
    rows = []
    for kill in (*kills, None):
        storage = folder / ("machine" if is_same else f"machine {len(list(folder.glob('machine *')))}")
        start = time.monotonic()
        code = run(arguments, str(place), storage, proxy, kill)
        row = {"command": arguments[0], "killed at": kill.path if kill else None, "exit": code}
        rows.append({**row, "stored": kill.is_stored if kill else None, "seconds": round(time.monotonic() - start, 1)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def sha256(content: bytes) -> str:
    """Of these bytes."""
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Make it locally, make it with kills, compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.05, help="of the requests that fail (.05)")
    parser.add_argument("--kills", type=int, default=2, help="of each command (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--same-machine", action="store_true", help="go on in the same local folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = (args.out / "work").resolve()
    with suppress(FileNotFoundError):
        shutil.rmtree(work)
    work.mkdir()
    for name in ("AWS_PROFILE", "FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "SOLLUNE_ATTACHED"):
        os.environ.pop(name, None)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "SOLLUNE_STORAGE": str(work / "here"), "XDG_CACHE_HOME": str(work / "home"),
    }  # fmt: skip
    local, remote, random_ = work / "local", Location("s3", "bucket/runs/tiny"), random.Random(args.seed)
    for arguments in (CACHE, TRAIN):
        run(arguments, str(local), work / "none", None, None)
    with s3_server() as server, faulty_proxy(server, 0.0, args.seed) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.address
        store = store_of(remote)
        store._files.mkdir("bucket")
        proxy.share = args.share
        kills = [Kill(".tar", random_.randint(1, 2), number % 2 == 1) for number in range(args.kills)]
        rows = until_done(CACHE, remote, work, proxy, kills, args.same_machine)
        rows += [{"command": "shards verify", "exit": verify(remote, work / "verifying")}]
        kills = [Kill("/distill/checkpoints/", random_.randint(2, 12), number % 2 == 1) for number in range(args.kills)]
        rows += until_done(TRAIN, remote, work, proxy, kills, args.same_machine)
        faults, proxy.share = dict(proxy.faults), 0.0
        names = [f"cache/data/{path.name}" for path in sorted((local / "cache/data").iterdir())]
        names += [f"{LAST}/{name}" for name in COMPARED]
        same = {name: sha256(store.read(remote / name) or b"") == sha256((local / name).read_bytes()) for name in names}
    results = {"same": same, "faults": faults, "calls": rows}
    (args.out / "storage_killing.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({"same": same, "faults": faults}, indent=1))
    shutil.rmtree(work)
    if not all(same.values()):
        raise SystemExit(1)


def verify(remote: Location, storage: Path) -> int:
    """`shards verify` on a machine that has nothing."""
    command = [sys.executable, "-m", "stages", "shards", "verify", str(remote)]
    environment = {**os.environ, "SOLLUNE_STORAGE": str(storage)}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    main()
