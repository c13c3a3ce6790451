"""Statistics of channels in bins of path time, and what a cache holds: states, classes, velocities and bytes."""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shards.reader import Reader
from shards.record import FEATURES, PER_LANDING, SPLITS, Record, tensors_of
from stages.system.refusal import escape_unprintable


@dataclass(frozen=True)
class Statistics:
    """Count, mean and squared deviations of the n channels of a block in each bin; all in float64."""

    count: Float[Tensor, "bins 1"]
    mean: Float[Tensor, "bins n"]
    square: Float[Tensor, "bins n"]
    """sum of squared distances from the mean"""

    @classmethod
    def empty(cls, bins: int, n: int) -> "Statistics":
        """Statistics of no rows."""
        zeros = torch.zeros(bins, n, dtype=torch.float64)
        return cls(zeros[:, :1], zeros, zeros)

    @classmethod
    def from_values(cls, values: Float[Tensor, "m n"], bin_of_row: Int[Tensor, " m"], bins: int) -> "Statistics":
        """Statistics of these rows."""
        empty = cls.empty(bins, values.shape[1])
        values = values.double()
        count = empty.count.index_add(0, bin_of_row, torch.ones(len(values), 1, dtype=torch.float64))
        mean = empty.mean.index_add(0, bin_of_row, values) / count.clamp_min(1)
        return cls(count, mean, empty.square.index_add(0, bin_of_row, (values - mean[bin_of_row]).square()))

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of the rows of both (Chan, Golub and LeVeque's update)."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        delta = other.mean - self.mean
        square = self.square + other.square + delta.square() * self.count * share
        return Statistics(count, self.mean + delta * share, square)

    def merge_bins(self) -> "Statistics":
        """The same rows in a single bin."""
        bins = (slice(i, i + 1) for i in range(len(self.count)))
        each = (Statistics(self.count[i], self.mean[i], self.square[i]) for i in bins)
        return functools.reduce(Statistics.merge, each)

    def std(self, correction: int = 1) -> Float[Tensor, "bins n"]:
        """Standard deviations, 0 where there are too few rows for one."""
        return (self.square / (self.count - correction).clamp_min(1)).sqrt()


BINS = 10
MAX_BAR_CHARACTERS = 40
"""Of the longest bar of a histogram."""
MAX_CLASSES = 20
SMALL = "k, s, trajectory"


@dataclass
class CacheStats:
    """Sums over the records of a cache; bin i holds i/BINS <= s < (i+1)/BINS, and the last one s = 1 too."""

    sums: Float[Tensor, "3 bins"] = field(default_factory=lambda: torch.zeros(3, BINS, dtype=torch.float64))
    """over the states: 1, mean square of v_cond, mean square of v_uncond"""
    classes: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Add one record."""
        states = record.states
        squares = [values.double().square().mean(dim=(1, 2, 3)) for values in (states.v_cond, states.v_uncond)]
        self.sums.index_add_(
            1, (states.s * BINS).long().clamp(0, BINS - 1), torch.stack([torch.ones_like(squares[0]), *squares])
        )
        self.classes[record.class_name] += 1
        for name, values in tensors_of(record).items():
            self.bytes_of[_part(name)] += values.nbytes


def _part(name: str) -> str:
    """The part of a record in whose sum a tensor's bytes are."""
    if name in PER_LANDING:
        return "landings"
    return "features" if name.startswith(FEATURES) else SMALL if name in SMALL.split(", ") else name


def collect_stats(reader: Reader) -> CacheStats:
    """Sums over every record of every split."""
    stats = CacheStats()
    for split in SPLITS:
        for record in reader.records(split):
            stats.add(record)
    return stats


def stats_lines(reader: Reader, stats: CacheStats) -> Iterator[str]:
    """The numbers as lines of text."""
    yield f"{'split':<12}{'shards':>8}{'records':>10}{'states':>10}{'bytes':>16}"
    for split in SPLITS:
        totals = reader.manifest.totals(split)
        yield f"{split:<12}{totals.shards:>8}{totals.records:>10}{totals.states:>10}{totals.bytes:>16,}"
    if reader.manifest.schema_version > 1:
        yield f"\n{'size':<12}{'shards':>8}{'records':>10}{'states':>10}{'bytes':>16}"
        for size in reader.manifest.sizes_of():
            each = [reader.manifest.totals(split, size) for split in SPLITS]
            shards, records, states, count = map(sum, zip(*each, strict=True))
            yield f"{size!s:<12}{shards:>8}{records:>10}{states:>10}{count:>16,}"
    yield f"\n{'s':<12}{'states':>8}{'rms v_cond':>14}{'rms v_uncond':>14}"
    for i, (count, *squares) in enumerate(stats.sums.T.tolist()):
        rms = [f"{(square / count) ** 0.5:.4f}" if count else "-" for square in squares]
        bar = _bar(count, float(stats.sums[0].max()))
        yield f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}  {count:>8.0f}{rms[0]:>14}{rms[1]:>14}{bar}"
    yield f"\n{'class':<32}{'records':>10}"
    yield from _class_lines(stats.classes)
    yield f"\n{'part':<32}{'bytes':>16}"
    total = sum(shard.bytes for shard in reader.manifest.shards)
    sizes = {**stats.bytes_of, "JSON and framing": total - stats.bytes_of.total()}
    yield from (f"{name:<32}{count:>16,}{_bar(count, max(sizes.values()))}" for name, count in sizes.items())
    if reader.manifest.failures:
        yield f"\n{len(reader.manifest.failures)} prompts failed:"
        for failure in reader.manifest.failures:
            yield f"{failure.file} {failure.key}: {escape_unprintable(failure.reason)}"


def _class_lines(counts: Counter[str]) -> Iterator[str]:
    """A line for each class in order of its name; of many classes the largest, and how large the others are."""
    most = max(counts.values())
    shown = sorted(counts) if len(counts) <= MAX_CLASSES else [name for name, _ in ranked(counts)[:MAX_CLASSES]]
    yield from (f"{escape_unprintable(name):<32}{counts[name]:>10}{_bar(counts[name], most)}" for name in shown)
    rest = ranked(counts)[len(shown) :]
    if rest:
        yield f"and {len(rest):,} more classes, by how many records they have:"
        sizes = Counter(1 << (count.bit_length() - 1) for _, count in rest)  # the power of two at or below
        for lowest, classes in sorted(sizes.items(), reverse=True):
            records = f"{lowest:,} to {2 * lowest - 1:,} records" if lowest > 1 else "1 record"
            yield f"{records:<32}{classes:>10}{_bar(classes, max(sizes.values()))}"


def ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Classes with their records, the largest first, equals by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _bar(count: float, largest: float) -> str:
    """A bar of a histogram, at least one character unless the count is 0."""
    length = max(1, round(MAX_BAR_CHARACTERS * count / largest)) if count else 0
    return f"  {'#' * length}" if length else ""
