"""The share of caching time outside the teacher's forward pass: `python -m benchmarks.cache [--size full]`.

`cache-teacher` fills a fresh folder with timers around the networks. Loading the teacher is counted apart: it is paid
once, whatever the size of the cache.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from benchmarks.full_size import make_full_size
from configs.load import load
from stages import cache_teacher

LIMIT = 0.05
FULL_SIZE = [
    *("--prompts.source", "symbolic", "--validation-count", "1", "--render.records-per-shard", "1"),
    *("--render.batch-size", "2", "--render.states.steps", "4"),
]


def now() -> float:
    """Seconds, after the pending work of a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class CallTimer:
    """Begin and end of timed calls."""

    now: Callable[[], float] = now
    spans: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Total time of the calls."""
        return sum(ended - began for began, ended in self.spans)

    @contextmanager
    def time_calls(self, owner: Any, name: str) -> Iterator[None]:
        """Time every call of `owner.name` while the context lasts."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return original(*args, **options)
            finally:
                self.spans.append((began, self.now()))

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)


@dataclass(frozen=True)
class CacheTiming:
    """One run; all in seconds."""

    total_seconds: float
    loading: float
    forward: float

    @property
    def other_seconds(self) -> float:
        """Time of neither loading nor the teacher."""
        return self.total_seconds - self.loading - self.forward

    @property
    def overhead_share(self) -> float:
        """Share of the time after loading that is not the teacher's forward pass."""
        return self.other_seconds / (self.total_seconds - self.loading)


def measure(options: list[str], run: Path) -> CacheTiming:
    """Fill a fresh cache."""
    shutil.rmtree(run, ignore_errors=True)
    config = load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], [*options, "--run", str(run)])
    loading, networks, texts = CallTimer(), CallTimer(), CallTimer()
    with (
        loading.time_calls(cache_teacher, "load_components"),
        networks.time_calls(UNet2DConditionModel, "forward"),
        texts.time_calls(CLIPTextModel, "forward"),
    ):
        began = now()
        cache_teacher.run(config)
        total = now() - began
    return CacheTiming(total, loading.seconds, networks.seconds + texts.seconds)


def main() -> int:
    """0 when the share is within the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("embedded", "full"), default="embedded", help="of the teacher")
    parser.add_argument("--count", type=int, help="prompts (default: 300 embedded, 2 at full size)")
    parser.add_argument("--rounds", type=int, default=3, help="runs (default: 3; 1 at full size)")
    parser.add_argument("--teacher", type=Path, default=Path("runs/full-size"), help="path of the full-size folder")
    args = parser.parse_args()
    full = args.size == "full"
    options = ["--count", str(args.count or (2 if full else 300))]
    if full:
        options += [*FULL_SIZE, "--teacher", str(make_full_size(args.teacher))]
    with tempfile.TemporaryDirectory() as folder:
        timings = [measure(options, Path(folder) / "run") for _ in range(1 if full else args.rounds)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{args.size} teacher, {options[1]} prompts, {device}, {len(timings)} runs\n")
    print("| whole run | loading | teacher's forward | the rest | share that is not the teacher |")
    print("|---|---|---|---|---|")
    for timing in timings:
        print(
            f"| {timing.total_seconds:.1f} s | {timing.loading:.1f} s | {timing.forward:.1f} s "
            f"| {timing.other_seconds:.2f} s | {timing.overhead_share:.1%} |"
        )
    share = statistics.median(timing.overhead_share for timing in timings)
    print(f"\nmedian share {share:.1%}, limit {LIMIT:.0%}")
    return 0 if share <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
