"""What a cache leaves out, and what lies in it that nobody vouches for.

What a record must agree with: all the others, and the table.

Everything that can be wrong with a cache, found by reading all of it.

Damaged files are moved aside, never deleted, so that what is missing can be made again.
"""

from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from shards.archive import TAR_BLOCK_BYTES, Failure, Shard
from shards.codec import decode
from shards.integrity import Damaged, Fault, read_at_most
from shards.journal import broken_entries, journal_faults
from shards.manifest import MANIFEST_FILE, Manifest
from shards.record import FEATURES, PER_PROMPT, PER_STATE, SPLITS, Record
from shards.table import Table, table_rows
from shards.table_check import TABLE_FOLDER as TABLE
from stages.system.disk import refuse_write_errors
from stages.system.refusal import Refused

COMPLETE_FILE = "COMPLETE"
MAX_DIGITS = 20


def completeness_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each shard and key that is missing or that nobody named; a prompt that failed is not missing."""
    for split in SPLITS:
        yield from _split_faults(manifest.shards_of(split), f"data/{split}", manifest.failures)
    known = {shard.file for shard in manifest.shards}
    for failure in manifest.failures:
        if failure.file not in known:
            yield Fault(failure.file, f"the manifest tells why {failure.key} failed, and does not name the shard")
    for path in sorted((folder / "data").glob("*.tar")):
        file = f"data/{path.name}"
        if file not in known:
            yield Fault(file, "is not in the manifest, and plain readers would read it")
    yield from _prompt_count_faults(folder, manifest)


def _split_faults(shards: tuple[Shard, ...], name: str, failures: tuple[Failure, ...]) -> Iterator[Fault]:
    follows: int | None = None
    for number, shard in enumerate(shards):
        if shard.file != f"{name}-{number:06d}.tar":
            yield Fault(f"{name}-{number:06d}.tar", f"missing: {shard.file} is there - make the cache whole")
            return
        keys = [int(one.key) for one in failures if one.file == shard.file]
        low, high = min([int(shard.first_key), *keys]), max([int(shard.last_key), *keys])
        if follows is not None and low != follows:
            yield Fault(shard.file, f"keys {low:09d} on, {follows:09d} should be next", f"{low:09d}")
        if high - low + 1 != shard.records + len(keys):
            yield Fault(shard.file, f"{high - low + 1} keys lie between its ends, {shard.records} records are there")
        follows = high + 1


def _prompt_count_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Whether a cache that was finished once still answers for as many prompts."""
    try:
        said = read_at_most(folder / COMPLETE_FILE, MAX_DIGITS).strip()
    except FileNotFoundError:
        return
    except (Damaged, OSError) as error:
        yield Fault(COMPLETE_FILE, str(error))
        return
    answers = sum(shard.records for shard in manifest.shards) + len(manifest.failures)
    if not said.isdigit():
        yield Fault(COMPLETE_FILE, f"says {said!r}, should say how many prompts there are")
    elif answers < int(said):
        last = [shard.file for shard in chain.from_iterable(manifest.shards_of(split)[-1:] for split in SPLITS)]
        yield Fault(
            COMPLETE_FILE, f"{said.decode()} prompts were answered for, now {answers} are; the last shards are {last}"
        )


Shapes = dict[str, tuple[int, ...]]


class RecordConsistency:
    """What the records so far have been like: all of a cache have the same blocks and shapes, and none comes twice."""

    def __init__(self) -> None:
        self._first_shapes: tuple[str, Shapes] | None = None
        self._pictures: dict[tuple[int, str], str] = {}

    def mismatch(self, record: Record, file: str) -> str | None:
        """How this record does not fit to those before it."""
        key, shapes = f"{record.key} of {file}", _shapes(record)
        other, wanted = self._first_shapes = self._first_shapes or (key, shapes)
        differs = [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]
        if differs or list(wanted) != list(shapes):
            name = min(differs, default="blocks")
            return f"{name} has shape {shapes.get(name)}, record {other} has {wanted.get(name)}"
        twin = self._pictures.setdefault((record.seed, record.text), key)
        return None if twin == key else f"has the sentence and the seed of record {twin}: the same record twice"


class ShardTableRows:
    """The rows of the table that belong to one shard; each column is read once, when it is first asked for."""

    def __init__(self, table: Table, first: int, shard: Shard) -> None:
        self.table, self._shard = table, shard
        self._rows = slice(first, first + shard.draws)
        self._columns: dict[str, np.ndarray] = {}

    def mismatch(self, record: Record, number: int) -> str | None:
        """What the table says otherwise about record `number` of the shard."""
        if record.class_name not in self.table.class_names:
            return f"class {record.class_name} is not in the table"
        if tuple(record.features.by_block) != self.table.blocks:
            return f"has blocks {', '.join(record.features.by_block)}, the table has {', '.join(self.table.blocks)}"
        here = slice(number * len(record.states), (number + 1) * len(record.states))
        wanted = table_rows(record, self._shard.split, self.table.class_names.index(record.class_name))
        for name, values in wanted.items():
            try:
                found = self._column(name)[here]
            except (Refused, KeyError) as error:
                return f"the table has no {name}: {error}"
            if found.dtype != values.dtype or not np.array_equal(found, values):
                return f"the table says another {name}"
        return None

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self.table.column(name, self._rows)
        return self._columns[name]


def _shapes(record: Record) -> Shapes:
    """Name -> shape of each tensor, without the number of draws."""
    named = {name: getattr(record, name).shape for name in PER_PROMPT}
    named |= {name: getattr(record.states, name).shape[1:] for name in PER_STATE}
    named |= {f"{FEATURES}{block}": values.shape[1:] for block, values in record.features.by_block.items()}
    return {name: tuple(shape) for name, shape in named.items()}


def inspect(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each fault of a cache: first of its files, then of what the shards leave out, then of their records."""
    damaged = set()
    for fault in manifest.faults(folder):
        damaged.add(fault.file)
        yield fault
    yield from completeness_faults(folder, manifest)
    yield from journal_faults(folder, manifest)
    table = None
    if not any(file.startswith(TABLE) for file in damaged) and (manifest.table or (folder / TABLE).exists()):
        try:
            table = Table.open(folder)
        except Refused as refusal:
            yield Fault(TABLE, str(refusal))
    seen, first = RecordConsistency(), 0
    for split in SPLITS:
        for shard in manifest.shards_of(split):
            if shard.file not in damaged or _is_whole(folder, shard):
                yield from _record_faults(
                    folder, shard, None if table is None else ShardTableRows(table, first, shard), seen
                )
            first += shard.draws


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a bad shard has the bytes that the manifest means, so that its records tell what is wrong."""
    try:
        return shard.fault(folder) is None
    except Refused:
        return False


def _record_faults(
    folder: Path, shard: Shard, rows: ShardTableRows | None, consistency: RecordConsistency
) -> Iterator[Fault]:
    """What is wrong with the first bad record of a shard whose bytes are what they were."""
    last_key = ""
    with open(folder / shard.file, "rb") as tar:
        for number, place in enumerate(shard.offsets):
            tar.seek(place.first)
            framed = tar.read(place.st_offset + place.st_size - place.first)
            content = framed[TAR_BLOCK_BYTES:]
            try:
                record = decode(content[: place.json_size], content[place.st_offset - place.json_offset :])
            except Refused as refusal:
                yield Fault(shard.file, f"at byte {place.json_offset}: {refusal}")
                return
            what = _record_fault(record, shard, last_key, _tar_key(framed)) or consistency.mismatch(record, shard.file)
            if what is None and rows is not None:
                what = rows.mismatch(record, number)
            if what:
                yield Fault(shard.file, what, record.key)
                return
            last_key = record.key
        if what := _tail_fault(tar, shard):
            yield Fault(shard.file, what)
    if last_key != shard.last_key:
        yield Fault(shard.file, f"ends with key {last_key}, manifest says {shard.last_key}")


def _tar_key(framed: bytes) -> str:
    """The key by which plain readers of tars know a record."""
    return framed[:100].rstrip(b"\0").decode("ascii", "replace").removesuffix(".json")


def _tail_fault(tar: BinaryIO, shard: Shard) -> str | None:
    """A tar ends with empty blocks: what else lies behind its last record would be read by others, and not by us."""
    tar.seek(shard.offsets[-1].last)
    left = shard.bytes - shard.offsets[-1].last
    while left > 0 and (piece := tar.read(min(left, 1 << 20))):
        if piece.strip(b"\0"):
            return f"something lies behind its last record, from byte {shard.offsets[-1].last} on"
        left -= len(piece)
    return None


def _record_fault(record: Record, shard: Shard, last_key: str, tar_key: str) -> str | None:
    draws = record.states
    if record.key == last_key:
        return "its key is there twice"
    if record.key <= last_key or (not last_key and record.key != shard.first_key):
        return f"comes after {last_key or 'the beginning'}, and the shard should begin with {shard.first_key}"
    if tar_key != record.key:
        return f"lies in the tar as {tar_key!r:.40}"
    if len(draws) != shard.states_per_record:
        return f"{len(draws)} draws, manifest says {shard.states_per_record}"
    floats = {
        "cond": record.cond,
        "x0": record.x0,
        "x_t": draws.x_t,
        "v_cond": draws.v_cond,
        "v_uncond": draws.v_uncond,
    }
    floats |= {"s": draws.s} | {f"features.{block}": values for block, values in record.features.by_block.items()}
    bad = [name for name, values in floats.items() if not bool(torch.isfinite(values).all())]
    if bad:
        return f"{', '.join(bad)}: not finite"
    if not bool(((draws.s >= 0) & (draws.s <= 1)).all()) or int(draws.k.min()) < 0:
        return "a time lies outside 0 to 1"
    return None


QUARANTINE_FOLDER = "quarantine"


def quarantine(cache: Path) -> list[Path]:
    """Move every damaged file of a cache into a fresh folder under CACHE/quarantine; returns where each of them is now.

    A table goes as a whole. A damaged manifest takes it along: the journal vouches for the shards, not for the table.
    """
    target = next(
        cache / QUARANTINE_FOLDER / f"{i:04d}" for i in count() if not (cache / QUARANTINE_FOLDER / f"{i:04d}").exists()
    )
    moved = []
    for file in sorted({_blocking_path(cache, file) for file in _damaged_files(cache)}):
        if (cache / file).exists() or (cache / file).is_symlink():
            with refuse_write_errors(target / file):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (cache / file).rename(target / file)
            moved.append(target / file)
    return moved


def _blocking_path(cache: Path, file: str) -> str:
    """What has to go so that a file can be made again: itself, or what stands where one of its folders should be."""
    for folder in reversed(Path(file).parents[:-1]):
        path = cache / folder
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            return str(folder)
    return file


def _damaged_files(cache: Path) -> Iterator[str]:
    try:
        manifest = Manifest.open(cache)
    except Damaged:
        yield MANIFEST_FILE
        yield TABLE
        yield from broken_entries(cache)
        return
    for fault in inspect(cache, manifest):
        yield TABLE if fault.file.startswith(TABLE) else fault.file
