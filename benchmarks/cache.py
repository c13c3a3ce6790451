"""How much of the time of caching is not the teacher's own forward pass: `python -m benchmarks.cache [--size full]`.

The real story is run into a fresh folder, with a clock around the networks. Loading the teacher is told apart: it is
paid once, whatever the size of the cache.
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
    """Seconds, after whatever a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class CallTimer:
    """When some calls began and ended."""

    now: Callable[[], float] = now
    spans: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Spent inside them, all together."""
        return sum(ended - began for began, ended in self.spans)

    @contextmanager
    def time_calls(self, owner: Any, name: str) -> Iterator[None]:
        """Time every call of `owner.name` while the context lasts."""
        true: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return true(*args, **options)
            finally:
                self.spans.append((began, self.now()))

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, true)


@dataclass(frozen=True)
class CacheTiming:
    """One run; all in seconds."""

    total_seconds: float
    loading: float
    forward: float

    @property
    def other_seconds(self) -> float:
        """What is neither loading nor the teacher."""
        return self.total_seconds - self.loading - self.forward

    @property
    def overhead_share(self) -> float:
        """Of the time after loading, what is not the teacher's forward pass."""
        return self.other_seconds / (self.total_seconds - self.loading)


def measure(words: list[str], run: Path) -> CacheTiming:
    """Fill a fresh cache."""
    shutil.rmtree(run, ignore_errors=True)
    config = load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], [*words, "--run", str(run)])
    loading, networks, texts = CallTimer(), CallTimer(), CallTimer()
    with (
        loading.time_calls(cache_teacher, "load_components"),
        networks.time_calls(UNet2DConditionModel, "forward"),
        texts.time_calls(CLIPTextModel, "forward"),
    ):
        began = now()
        cache_teacher.run(config)
        whole = now() - began
    return CacheTiming(whole, loading.seconds, networks.seconds + texts.seconds)


def main() -> int:
    """0 when the share is within the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("embedded", "full"), default="embedded", help="of the teacher")
    parser.add_argument("--count", type=int, help="prompts (default: 300 embedded, 2 at full size)")
    parser.add_argument("--rounds", type=int, default=3, help="runs (default: 3; 1 at full size)")
    parser.add_argument("--teacher", type=Path, default=Path("runs/full-size"), help="where the full-size folder lies")
    said = parser.parse_args()
    full = said.size == "full"
    words = ["--count", str(said.count or (2 if full else 300))]
    if full:
        words += [*FULL_SIZE, "--teacher", str(make_full_size(said.teacher))]
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(words, Path(folder) / "run") for _ in range(1 if full else said.rounds)]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{said.size} teacher, {words[1]} prompts, {where}, {len(found)} runs\n")
    print(
        "| whole run | loading | teacher's forward | the rest | share that is not the teacher |\n|---|---|---|---|---|"
    )
    for one in found:
        print(
            f"| {one.total_seconds:.1f} s | {one.loading:.1f} s | {one.forward:.1f} s | {one.other_seconds:.2f} s "
            f"| {one.overhead_share:.1%} |"
        )
    share = statistics.median(one.overhead_share for one in found)
    print(f"\nmedian share {share:.1%}, limit {LIMIT:.0%}")
    return 0 if share <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
