"""Mean and deviation of channels, gathered piece by piece without losing digits.

What a cache holds, in numbers: how much, at which times, of which classes, and how fast the velocities are.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.reader import Reader
from shards.record import SPLITS, Record
from stages.system.refusal import escape_unprintable


@dataclass(frozen=True)
class Statistics:
    """What is known of the n channels of a block, apart for each bin; all in float64."""

    count: Float[Tensor, "bins 1"]
    mean: Float[Tensor, "bins n"]
    square: Float[Tensor, "bins n"]
    """sum of squared distances from the mean"""

    @classmethod
    def empty(cls, bins: int, n: int) -> "Statistics":
        """What is known before the first row."""
        zeros = torch.zeros(bins, n, dtype=torch.float64)
        return cls(zeros[:, :1], zeros, zeros)

    @classmethod
    def from_values(cls, values: Float[Tensor, "m n"], bin_of_row: Int[Tensor, " m"], bins: int) -> "Statistics":
        """What these rows say."""
        empty = cls.empty(bins, values.shape[1])
        values = values.double()
        count = empty.count.index_add(0, bin_of_row, torch.ones(len(values), 1, dtype=torch.float64))
        mean = empty.mean.index_add(0, bin_of_row, values) / count.clamp_min(1)
        return cls(count, mean, empty.square.index_add(0, bin_of_row, (values - mean[bin_of_row]).square()))

    def merge(self, other: "Statistics") -> "Statistics":
        """What both say together (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        apart = other.mean - self.mean
        square = self.square + other.square + apart.square() * self.count * share
        return Statistics(count, self.mean + apart * share, square)

    def merge_bins(self) -> "Statistics":
        """The same rows in a single bin."""
        each = [
            Statistics(self.count[i : i + 1], self.mean[i : i + 1], self.square[i : i + 1])
            for i in range(len(self.count))
        ]
        found = each[0]
        for one in each[1:]:
            found = found.merge(one)
        return found

    def std(self, correction: int = 1) -> Float[Tensor, "bins n"]:
        """Standard deviations, 0 where there are too few rows for one."""
        return (self.square / (self.count - correction).clamp_min(1)).sqrt()


BINS = 10
MAX_BAR_CHARACTERS = 40
"""Letters of the longest bar of a histogram."""
MAX_CLASSES = 20


@dataclass
class CacheStats:
    """Sums over the records seen so far; bin i holds i/BINS <= s < (i+1)/BINS, and the last one s = 1 too."""

    states: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    square_cond: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    square_uncond: Float[Tensor, " bins"] = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    classes: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Add one record."""
        draws = record.states
        bins = (draws.s * BINS).long().clamp(0, BINS - 1)
        self.states.index_add_(0, bins, torch.ones(len(draws), dtype=torch.float64))
        self.square_cond.index_add_(0, bins, draws.v_cond.double().square().mean(dim=(1, 2, 3)))
        self.square_uncond.index_add_(0, bins, draws.v_uncond.double().square().mean(dim=(1, 2, 3)))
        self.classes[record.class_name] += 1
        for name, values in tensors_by_purpose(record).items():
            self.bytes_of[name] += sum(value.nbytes for value in values)


def tensors_by_purpose(record: Record) -> dict[str, list[Tensor]]:
    """The tensors of a record by what they are for."""
    draws = record.states
    return {
        "cond": [record.cond],
        "x0": [record.x0],
        "x_t": [draws.x_t],
        "v_cond": [draws.v_cond],
        "v_uncond": [draws.v_uncond],
        "k, s, trajectory": [draws.k, draws.s, draws.trajectory],
        "features": list(record.features.by_block.values()),
    }


def collect_stats(reader: Reader) -> CacheStats:
    """Sums over every record of every split."""
    stats = CacheStats()
    for split in SPLITS:
        for record in reader.records(split):
            stats.add(record)
    return stats


def stats_lines(reader: Reader, stats: CacheStats) -> Iterator[str]:
    """The numbers as lines of text."""
    yield f"{'split':<12}{'shards':>8}{'records':>10}{'draws':>10}{'bytes':>16}"
    for split in SPLITS:
        shards = reader.manifest.shards_of(split)
        sums = [sum(getattr(shard, name) for shard in shards) for name in ("records", "draws", "bytes")]
        yield f"{split:<12}{len(shards):>8}{sums[0]:>10}{sums[1]:>10}{sums[2]:>16,}"
    yield f"\n{'s':<12}{'draws':>8}{'rms v_cond':>14}{'rms v_uncond':>14}"
    for i, count in enumerate(stats.states.tolist()):
        squares = (stats.square_cond[i], stats.square_uncond[i])
        rms = [f"{(square / count).sqrt():.4f}" if count else "-" for square in squares]
        bar = _bar(count, float(stats.states.max()))
        yield f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}  {count:>8.0f}{rms[0]:>14}{rms[1]:>14}{bar}"
    yield f"\n{'class':<32}{'records':>10}"
    yield from _class_lines(stats.classes)
    yield f"\n{'part':<32}{'bytes':>16}"
    whole = sum(shard.bytes for shard in reader.manifest.shards)
    sizes = {**stats.bytes_of, "JSON and framing": whole - stats.bytes_of.total()}
    yield from (f"{name:<32}{count:>16,}{_bar(count, max(sizes.values()))}" for name, count in sizes.items())
    if reader.manifest.failures:
        yield f"\n{len(reader.manifest.failures)} prompts failed:"
        yield from (f"{one.file} {one.key}: {escape_unprintable(one.reason)}" for one in reader.manifest.failures)


def _class_lines(counts: Counter[str]) -> Iterator[str]:
    """A line for each class in order of its name; of many classes the largest, and how large the others are."""
    most = max(counts.values())
    shown = sorted(counts) if len(counts) <= MAX_CLASSES else [name for name, _ in ranked(counts)[:MAX_CLASSES]]
    yield from (f"{escape_unprintable(name):<32}{counts[name]:>10}{_bar(counts[name], most)}" for name in shown)
    rest = ranked(counts)[len(shown) :]
    if rest:
        yield f"and {len(rest):,} more classes, by how many records they have:"
        sizes = Counter(size_class(count) for _, count in rest)
        for lowest, classes in sorted(sizes.items(), reverse=True):
            records = f"{lowest:,} to {2 * lowest - 1:,} records" if lowest > 1 else "1 record"
            yield f"{records:<32}{classes:>10}{_bar(classes, max(sizes.values()))}"


def ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Classes with their records, the largest first, equals by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def size_class(count: int) -> int:
    """The power of two at or below a count of one or more."""
    return 1 << (count.bit_length() - 1)


def _bar(count: float, largest: float) -> str:
    """A bar of a histogram; whatever is not zero is seen."""
    letters = max(1, round(MAX_BAR_CHARACTERS * count / largest)) if count else 0
    return f"  {'#' * letters}" if letters else ""
