"""What a cache holds, in numbers: how much, at which times, of which classes, and how fast the velocities are."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from shards.reader import Reader
from shards.record import SPLITS, Record

BINS = 10


@dataclass
class Stats:
    """Sums over the records seen so far; bin i holds i/BINS <= s < (i+1)/BINS, and the last one s = 1 too."""

    draws: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    square_cond: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    square_uncond: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    classes: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)

    def see(self, record: Record) -> None:
        """Add one record."""
        draws = record.draws
        bins = (draws.s * BINS).long().clamp(0, BINS - 1)
        self.draws.index_add_(0, bins, torch.ones(len(draws), dtype=torch.float64))
        self.square_cond.index_add_(0, bins, draws.v_cond.double().square().mean(dim=(1, 2, 3)))
        self.square_uncond.index_add_(0, bins, draws.v_uncond.double().square().mean(dim=(1, 2, 3)))
        self.classes[record.class_name] += 1
        for name, values in parts(record).items():
            self.bytes_of[name] += sum(value.nbytes for value in values)


def parts(record: Record) -> dict[str, list[Tensor]]:
    """The tensors of a record by what they are for."""
    draws = record.draws
    return {
        "cond": [record.cond],
        "x0": [record.x0],
        "x_t": [draws.x_t],
        "v_cond": [draws.v_cond],
        "v_uncond": [draws.v_uncond],
        "k, s, trajectory": [draws.k, draws.s, draws.trajectory],
        "features": list(record.features.by_block.values()),
    }


def stats_of(reader: Reader) -> Stats:
    """Sums over every record of every split."""
    stats = Stats()
    for split in SPLITS:
        for record in reader.records(split):
            stats.see(record)
    return stats


def report(reader: Reader, stats: Stats) -> Iterator[str]:
    """The numbers as lines of text."""
    yield f"{'split':<12}{'shards':>8}{'records':>10}{'draws':>10}{'bytes':>16}"
    for split in SPLITS:
        shards = reader.manifest.of(split)
        sums = [sum(getattr(shard, name) for shard in shards) for name in ("records", "draws", "bytes")]
        yield f"{split:<12}{len(shards):>8}{sums[0]:>10}{sums[1]:>10}{sums[2]:>16,}"
    yield f"\n{'s':<12}{'draws':>8}{'rms v_cond':>14}{'rms v_uncond':>14}"
    for i, count in enumerate(stats.draws.tolist()):
        squares = (stats.square_cond[i], stats.square_uncond[i])
        rms = [f"{(square / count).sqrt():.4f}" if count else "-" for square in squares]
        yield f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}  {count:>8.0f}{rms[0]:>14}{rms[1]:>14}"
    yield f"\n{'class':<32}{'records':>10}"
    yield from (f"{name:<32}{count:>10}" for name, count in sorted(stats.classes.items()))
    yield f"\n{'part':<32}{'bytes':>16}"
    yield from (f"{name:<32}{count:>16,}" for name, count in stats.bytes_of.items())
    whole = sum(shard.bytes for shard in reader.manifest.shards)
    yield f"{'JSON and framing':<32}{whole - stats.bytes_of.total():>16,}"
    if reader.manifest.failures:
        yield f"\n{len(reader.manifest.failures)} prompts failed:"
        yield from (f"{one.file} {one.key}: {one.reason}" for one in reader.manifest.failures)
