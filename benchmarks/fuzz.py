"""A long, seeded run of hostile caches: `python -m benchmarks.fuzz [--mutations 100000] [--seed 0]`.

Every case must end in a correct reading, or in one refusal that names the file; a crash, a case of more than ten
seconds, a silent misreading, or memory over twice the largest record and a constant fails the run, and is printed with
the options that repeat it. The limit of memory is the system's own: what asks for more gets a MemoryError.
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType

from benchmarks.fuzz_cases import KINDS, FuzzCache

CASE_SECONDS = 10
INTERPRETER_BYTES = 64 << 20
"""What Python, torch and zarr may take besides: caches of modules, threads, rounding of their allocators."""


class Hang(BaseException):
    """A case took too long."""


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def on_alarm(signal_number: int, frame: FrameType | None) -> None:
    raise Hang(f"{CASE_SECONDS} s are over")


def kind_of(rng: Random) -> str:
    """The kind of a case, by its weight."""
    names = list(KINDS)
    return rng.choices(names, [KINDS[name][1] for name in names])[0]


def run(seed: int, number: int, world: FuzzCache) -> tuple[str, str]:
    """One case: its kind and its outcome."""
    rng = Random(f"{seed} {number}")
    kind = kind_of(rng)
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        return kind, KINDS[kind][0](rng, world)
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"\ncase {number} ({kind}): python -m benchmarks.fuzz --seed {seed} --only {number}", file=sys.stderr)
        traceback.print_exc()
        return kind, f"FAILED: {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    """0 when no case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, on_alarm)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/stamps"
        worlds = FuzzCache(Path(folder, "one")), FuzzCache(Path(folder, "several"), several_sizes=True)
        largest = max(world.largest for world in worlds)
        numbers = range(args.mutations) if args.only is None else [args.only]
        began, outcomes = time.perf_counter(), Counter[tuple[str, str]]()
        most = status("VmData") + 2 * largest + INTERPRETER_BYTES
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
        for number in numbers:
            outcomes[run(args.seed, number, worlds[number // 100 % 2])] += 1
            if sys.stderr.isatty():
                print(f"\r{number}", end="", file=sys.stderr)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:<26}{outcome:<24}{count:>8}")
    failed = sum(count for (_, outcome), count in outcomes.items() if outcome.startswith("FAILED"))
    print(
        f"{outcomes.total()} mutations in {time.perf_counter() - began:.0f} s, seed {args.seed}: {failed} failed; "
        f"largest record {largest} bytes, memory grew by {(status('VmHWM') - before) / 2**20:.1f} MiB at most"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
