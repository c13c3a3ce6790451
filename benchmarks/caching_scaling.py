"""Two local caching workers against one: `python -m benchmarks.caching_scaling [--count 400] [--rounds 3]`.

The rate is that of the shards between the first and the last of each worker, without the loading of the teacher. Beside
it stands what the machine itself gives: two commands of one worker at the same time, in folders of their own. Needs as
many idle cores as workers.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LIMIT = 0.9
PER_SHARD = 5


def start(run: Path, count: int, workers: int) -> "subprocess.Popen[bytes]":
    """`cache-teacher` with the embedded teacher, in shards of a few prompts."""
    words = [sys.executable, "-m", "stages", "cache-teacher", "--config", "configs/tiny.yaml", "--run", str(run)]
    words += ["--count", str(count), "--validation-count", str(PER_SHARD), "--workers", str(workers)]
    words += ["--render.records-per-shard", str(PER_SHARD), "--render.batch-size", str(PER_SHARD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def prompts_per_second(runs: Sequence[Path], workers: int) -> float:
    """The rate of all these runs together, by the times at which their shards were entered.

    From the moment at which each worker has finished one, to that at which the first of them has no other to begin.
    """
    times = [sorted(path.stat().st_mtime for path in (run / "cache" / "journal").glob("*.json")) for run in runs]
    first, last = max(of_run[workers - 1] for of_run in times), min(of_run[-workers] for of_run in times)
    made = sum(first < time <= last for of_run in times for time in of_run)
    if made < 4 * workers * len(runs):
        raise RuntimeError(f"{made} shards between the first and the last of each worker - take more prompts")
    return made * PER_SHARD / (last - first)


def measure(folder: Path, count: int, workers: int, commands: int) -> float:
    """Prompts a second of some commands at once, each with some workers."""
    runs = [folder / f"{workers}-{number}" for number in range(commands)]
    jobs = [start(run, count, workers) for run in runs]
    try:
        if any(job.wait() for job in jobs):
            raise RuntimeError(f"{runs}: a command failed")
    finally:
        for job in jobs:
            job.terminate()
            job.wait()
    return prompts_per_second(runs, workers)


def main() -> int:
    """0 when the workers reach the efficiency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="training prompts of each command (default: 400)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median counts (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="workers against one (default: 2)")
    args = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    print(f"| one worker | {args.workers} workers | {args.workers} commands of one | efficiency | the machine's own |")
    print("|---|---|---|---|---|")
    efficiencies = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="scaling-") as name:
            one = measure(Path(name) / "one", args.count, 1, 1)
            many = measure(Path(name) / "many", args.count * args.workers, args.workers, 1)
            apart = measure(Path(name) / "apart", args.count, 1, args.workers)
        efficiencies.append(many / one / args.workers)
        rates = " | ".join(f"{rate:.2f}/s" for rate in (one, many, apart))
        print(f"| {rates} | {efficiencies[-1]:.2f} | {apart / one / args.workers:.2f} |", flush=True)
    efficiency = statistics.median(efficiencies)
    print(f"\nmedian efficiency {efficiency:.2f}, limit {LIMIT}")
    return 0 if efficiency >= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
