"""Everything that can be wrong with a cache, found by reading all of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from configs.refusal import Refused
from shards.archive import BLOCK
from shards.codec import PER_DRAW, decode
from shards.damage import Fault
from shards.gaps import gaps
from shards.journal import journal_faults
from shards.manifest import Manifest, Shard
from shards.record import SPLITS, Record
from shards.table import Table
from shards.tabulate import COLUMNS, FEATURE, rows_of
from shards.tabulate import NAME as TABLE

Shapes = dict[str, tuple[int, ...]]


def inspect(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each fault of a cache: first of its files, then of what the shards leave out, then of their records."""
    damaged = set()
    for fault in manifest.faults(folder):
        damaged.add(fault.file)
        yield fault
    yield from gaps(folder, manifest)
    yield from journal_faults(folder, manifest)
    table = None
    if not any(file.startswith(TABLE) for file in damaged) and (manifest.table or (folder / TABLE).exists()):
        try:
            table = Table.open(folder)
            yield from _columns(folder, table)
        except Refused as refusal:
            yield Fault(TABLE, str(refusal))
    seen, first = Seen(), 0
    for split in SPLITS:
        for shard in manifest.of(split):
            if shard.file not in damaged or _is_whole(folder, shard):
                yield from _records(folder, shard, table, first, seen)
            first += shard.draws


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a bad shard has the bytes that the manifest means, so that its records tell what is wrong."""
    try:
        return shard.fault(folder) is None
    except Refused:
        return False


class Seen:
    """What the records so far have been like: all of a cache have the same blocks and shapes, and none comes twice."""

    def __init__(self) -> None:
        self._like: tuple[str, Shapes] | None = None
        self._pictures: dict[tuple[int, str], str] = {}

    def slip(self, record: Record, file: str) -> str | None:
        """How this record does not fit to those before it."""
        key, shapes = f"{record.key} of {file}", _shapes(record)
        other, wanted = self._like = self._like or (key, shapes)
        differs = [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]
        if differs or list(wanted) != list(shapes):
            name = min(differs, default="blocks")
            return f"{name} has shape {shapes.get(name)}, record {other} has {wanted.get(name)}"
        twin = self._pictures.setdefault((record.seed, record.text), key)
        return None if twin == key else f"has the sentence and the seed of record {twin}: the same record twice"


def _shapes(record: Record) -> Shapes:
    """Name -> shape of each tensor, without the number of draws."""
    named = {"cond": record.cond.shape, "x0": record.x0.shape}
    named |= {name: getattr(record.draws, name).shape[1:] for name in PER_DRAW}
    named |= {f"features.{block}": values.shape[1:] for block, values in record.features.by_block.items()}
    return {name: tuple(shape) for name, shape in named.items()}


def _columns(folder: Path, table: Table) -> Iterator[Fault]:
    """Columns that the table lacks, or has without being asked for."""
    wanted = {*COLUMNS, *(f"{FEATURE}{block}" for block in table.blocks)}
    found = {path.name for path in (folder / TABLE).iterdir() if path.is_dir()}
    for name in sorted(wanted ^ found):
        yield Fault(f"{TABLE}/{name}", "is missing" if name in wanted else "is a column that no table has")


def _records(folder: Path, shard: Shard, table: Table | None, first: int, seen: Seen) -> Iterator[Fault]:
    """What is wrong with the first bad record of a shard whose bytes are what they were."""
    last_key = ""
    with open(folder / shard.file, "rb") as tar:
        for place in shard.offsets:
            tar.seek(place.first)
            framed = tar.read(place.st_offset + place.st_size - place.first)
            content = framed[BLOCK:]
            try:
                record = decode(content[: place.json_size], content[place.st_offset - place.json_offset :])
            except Refused as refusal:
                yield Fault(shard.file, f"at byte {place.json_offset}: {refusal}")
                return
            what = _slip(record, shard, last_key, _named(framed)) or seen.slip(record, shard.file)
            if what is None and table is not None:
                what = _differs(record, shard, table, first)
            if what:
                yield Fault(shard.file, what, record.key)
                return
            last_key, first = record.key, first + len(record.draws)
        if what := _tail(tar, shard):
            yield Fault(shard.file, what)
    if last_key != shard.last_key:
        yield Fault(shard.file, f"ends with key {last_key}, manifest says {shard.last_key}")


def _named(framed: bytes) -> str:
    """The key by which plain readers of tars know a record."""
    return framed[:100].rstrip(b"\0").decode("ascii", "replace").removesuffix(".json")


def _tail(tar: BinaryIO, shard: Shard) -> str | None:
    """A tar ends with empty blocks: what else lies behind its last record would be read by others, and not by us."""
    tar.seek(shard.offsets[-1].last)
    left = shard.bytes - shard.offsets[-1].last
    while left > 0 and (piece := tar.read(min(left, 1 << 20))):
        if piece.strip(b"\0"):
            return f"something lies behind its last record, from byte {shard.offsets[-1].last} on"
        left -= len(piece)
    return None


def _slip(record: Record, shard: Shard, last_key: str, named: str) -> str | None:
    draws = record.draws
    if record.key == last_key:
        return "its key is there twice"
    if record.key <= last_key or (not last_key and record.key != shard.first_key):
        return f"comes after {last_key or 'the beginning'}, and the shard should begin with {shard.first_key}"
    if named != record.key:
        return f"lies in the tar as {named!r:.40}"
    if len(draws) != shard.draws_per_record:
        return f"{len(draws)} draws, manifest says {shard.draws_per_record}"
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


def _differs(record: Record, shard: Shard, table: Table, first: int) -> str | None:
    """The column of the table that does not say what the record says."""
    if record.class_name not in table.class_names:
        return f"class {record.class_name} is not in the table"
    if tuple(record.features.by_block) != table.blocks:
        return f"has blocks {', '.join(record.features.by_block)}, the table has {', '.join(table.blocks)}"
    wanted = rows_of(record, shard.split, table.class_names.index(record.class_name))
    for name, values in wanted.items():
        try:
            found = table.column(name, slice(first, first + len(values)))
        except (Refused, KeyError) as error:
            return f"the table has no {name}: {error}"
        if found.dtype != values.dtype or not np.array_equal(found, values):
            return f"the table says another {name}"
    return None
