"""What a cache and a run survive: `python -m benchmarks.faults`, for `--kills 30` or what else is args for.

--kills: a real `python -m stages cache-teacher` is killed (-9) at random moments of the time in which it writes, three
times in one life, and then goes on to its end: each time the bytes must be those of a run that was never stopped, and
at no kill may anything half-made lie under a final name.
--steps: a small job is killed before every single step that it takes on the disk.
--flips, --cuts: one bit of a real cache is changed, or a file is cut: verify must exit with 1, and repair must restore
the same bytes.
--checkpoints: a process that saves one checkpoint after another is killed at so many random moments, and before every
step that it takes on the disk; one bit of its newest checkpoint is changed, or a file is cut; files may not grow
beyond a size. Each time the newest whole checkpoint must be restored, to the last bit and never older than the last one
whose saving had ended, all that is kept must be whole, and what was to stay must be there.
"""

import argparse
import functools
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from benchmarks.killing import fill_small_cache, incomplete_files, kill_before_step, leftovers_text, read_files

TEACH = ["-m", "stages", "cache-teacher", "--config", "configs/tiny.yaml"]
LARGE_CACHE = [
    "--count",
    "120",
    "--validation-count",
    "6",
    "--render.records-per-shard",
    "6",
    "--render.states.steps",
    "6",
]
SMALL_CACHE = [
    "--count",
    "8",
    "--validation-count",
    "2",
    "--render.records-per-shard",
    "2",
    "--render.states.steps",
    "4",
]
KILLS_A_LIFE = 3
KINDS = (".tar", "manifest.json", "zarr.json", "/c/")
"""A flip meets each kind of file as often as any other."""


def run_cache_teacher(run: Path, seconds: float | None = None) -> float | None:
    """Run cache-teacher, killed so long after it says its first word, just before it writes; how long it wrote.

    None when it was killed. Raises when it fails by itself.
    """
    job = subprocess.Popen(
        [sys.executable, "-u", *TEACH, *LARGE_CACHE, "--run", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert job.stdout
    job.stdout.readline()
    began = time.perf_counter()
    try:
        job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGKILL)
        job.communicate()
        if job.returncode == -signal.SIGKILL:
            return None
    if job.returncode:
        raise RuntimeError(f"cache-teacher failed: {job.returncode}")
    return time.perf_counter() - began


def kill_cache_runs(folder: Path, kill_count: int, rng: random.Random) -> int:
    """Kill and resume; returns how many lives went wrong."""
    run_cache_teacher(folder / "warm")  # the page cache decides how long the first run takes
    writes = run_cache_teacher(folder / "whole")
    assert writes is not None
    whole = read_files(folder / "whole" / "cache")
    print(f"an uninterrupted run writes {len(whole)} files, {sum(map(len, whole.values())):,} bytes in {writes:.2f} s")
    made, late, failed, life = 0, 0, 0, 0
    while made < kill_count:
        run, slips, before = folder / f"life{life}", list[str](), 0.0
        for moment in sorted(rng.uniform(0, writes) for _ in range(min(KILLS_A_LIFE, kill_count - made))):
            if run_cache_teacher(run, moment - before) is not None:
                late += 1
                break
            made, before = made + 1, moment
            slips += incomplete_files(run / "cache", whole)
            wrong = f" WRONG: {slips}" if slips else ""
            print(f"life {life}, killed at {moment:.2f} s: {leftovers_text(run / 'cache')}{wrong}")
        run_cache_teacher(run)
        same = read_files(run / "cache") == whole and not list((run / "cache").rglob(".*"))
        print(f"life {life} went on to {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
        failed += bool(slips) or not same
        life += 1
    print(f"{made} kills in {life} lives ({late} came after the end), {failed} lives went wrong")
    return failed


def kill_at_each_step(folder: Path) -> int:
    """Kill a small job before each of its steps, and let it go on; returns how many times that went wrong."""
    failed, number = 0, 0
    call_silently(fill_small_cache, folder / "whole")
    whole = read_files(folder / "whole")
    while kill_before_step(lambda: fill_small_cache(folder / "killed"), number):
        slips = incomplete_files(folder / "killed", whole)
        call_silently(fill_small_cache, folder / "killed")
        same = read_files(folder / "killed") == whole and not list((folder / "killed").rglob(".*"))
        if slips or not same:
            print(f"step {number}: {slips or 'other bytes'}")
            failed += 1
        subprocess.run(["rm", "-r", str(folder / "killed")], check=True)
        number += 1
    print(f"killed before each of {number} steps on the disk, {failed} times it went wrong")
    return failed


def call_silently(act, *words):  # type: ignore[no-untyped-def]
    """Do something whose output is not needed."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return act(*words)


def damage_and_repair(folder: Path, flips: int, cuts: int, rng: random.Random) -> int:
    """Damage and repair a real cache; returns how many times that went wrong."""
    from configs.load import load
    from stages import cache_teacher, upkeep

    # The teacher is the same each time: loading it anew would take most of the time.
    cache_teacher.load_components = functools.lru_cache(cache_teacher.load_components)  # type: ignore[assignment]
    run, cache = folder / "run", folder / "run" / "cache"
    call_silently(
        cache_teacher.run,
        load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], ["--run", str(run), *SMALL_CACHE]),
    )
    whole, outcomes, failed = read_files(cache), Counter[tuple[str, str]](), 0
    for number in range(flips + cuts):
        kind = KINDS[number % len(KINDS)]
        file = rng.choice([file for file in whole if kind in file])
        bit, cut = rng.randrange(8 * len(whole[file])), number >= flips
        bad = bytearray(whole[file][: bit // 8] if cut else whole[file])
        if not cut:
            bad[bit // 8] ^= 1 << bit % 8
        (cache / file).write_bytes(bad)
        code = call_silently(upkeep.main, ["verify", str(run)])
        mended = call_silently(upkeep.main, ["repair", str(run)]) == 0 and read_files(cache) == whole
        outcomes[kind, "cut" if cut else "flip"] += 1
        if code != 1 or not mended:
            failed += 1
            how, end = "cut at" if cut else "bit", "mended" if mended else "NOT MENDED"
            print(f"{file}, {how} {bit}: verify exited with {code}, {end}")
            for name, good in whole.items():
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).write_bytes(good)
        subprocess.run(["rm", "-rf", str(cache / "quarantine")], check=True)
    for (kind, way), count in sorted(outcomes.items()):
        print(f"{kind:<16}{way:<6}{count:>5}")
    print(f"{flips} flips and {cuts} cuts, {failed} times it went wrong")
    return failed


def main() -> int:
    """0 when nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--checkpoints", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    nothing = not (args.kills or args.steps or args.flips or args.cuts or args.checkpoints)
    failed, rng = 0, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/stamps"
        if args.kills or nothing:
            failed += kill_cache_runs(Path(folder), args.kills or 30, rng)
        if args.steps:
            failed += kill_at_each_step(Path(folder) / "steps")
        if args.flips or args.cuts:
            failed += damage_and_repair(Path(folder), args.flips, args.cuts, rng)
        if args.checkpoints:
            from benchmarks import saving_faults

            failed += saving_faults.checkpoints(Path(folder) / "checkpoints", args.checkpoints, rng)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
