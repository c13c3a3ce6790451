"""Everything that can be wrong with a cache, found by reading all of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from configs.refusal import Refused
from shards.agreement import Rows, Seen
from shards.archive import BLOCK
from shards.codec import decode
from shards.damage import Fault
from shards.entries import Shard
from shards.gaps import gaps
from shards.journal import journal_faults
from shards.manifest import Manifest
from shards.record import SPLITS, Record
from shards.table import Table
from shards.tabulate import NAME as TABLE


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
        except Refused as refusal:
            yield Fault(TABLE, str(refusal))
    seen, first = Seen(), 0
    for split in SPLITS:
        for shard in manifest.of(split):
            if shard.file not in damaged or _is_whole(folder, shard):
                yield from _records(folder, shard, None if table is None else Rows(table, first, shard), seen)
            first += shard.draws


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Whether a bad shard has the bytes that the manifest means, so that its records tell what is wrong."""
    try:
        return shard.fault(folder) is None
    except Refused:
        return False


def _records(folder: Path, shard: Shard, rows: Rows | None, seen: Seen) -> Iterator[Fault]:
    """What is wrong with the first bad record of a shard whose bytes are what they were."""
    last_key = ""
    with open(folder / shard.file, "rb") as tar:
        for number, place in enumerate(shard.offsets):
            tar.seek(place.first)
            framed = tar.read(place.st_offset + place.st_size - place.first)
            content = framed[BLOCK:]
            try:
                record = decode(content[: place.json_size], content[place.st_offset - place.json_offset :])
            except Refused as refusal:
                yield Fault(shard.file, f"at byte {place.json_offset}: {refusal}")
                return
            what = _slip(record, shard, last_key, _named(framed)) or seen.slip(record, shard.file)
            if what is None and rows is not None:
                what = rows.differs(record, number)
            if what:
                yield Fault(shard.file, what, record.key)
                return
            last_key = record.key
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
