"""Everything that can be wrong with a cache, found by reading all of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from configs.refusal import Refused
from shards.codec import decode
from shards.damage import Fault
from shards.manifest import Manifest, Shard
from shards.record import SPLITS, Record
from shards.table import Table
from shards.tabulate import NAME as TABLE
from shards.tabulate import rows_of


def inspect(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each fault of a cache: first of its files, then of what the shards leave out, then of their records."""
    damaged = set()
    for fault in manifest.faults(folder):
        damaged.add(fault.file)
        yield fault
    yield from _gaps(folder, manifest)
    table = None
    if not any(file.startswith(TABLE) for file in damaged) and (manifest.table or (folder / TABLE).exists()):
        try:
            table = Table.open(folder)
        except Refused as refusal:
            yield Fault(TABLE, str(refusal))
    first = 0
    for split in SPLITS:
        for shard in manifest.of(split):
            if shard.file not in damaged:
                yield from _records(folder, shard, table, first)
            first += shard.draws


def _gaps(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Shards and keys that are missing between others, or twice; a prompt that failed is not missing."""
    for split in SPLITS:
        follows: int | None = None
        for number, shard in enumerate(manifest.of(split)):
            if shard.file != f"data/{split}-{number:06d}.tar":
                yield Fault(f"data/{split}-{number:06d}.tar", f"missing: {shard.file} is there - make the cache whole")
                break
            keys = [int(one.key) for one in manifest.failures if one.file == shard.file]
            low, high = min([int(shard.first_key), *keys]), max([int(shard.last_key), *keys])
            if follows is not None and low != follows:
                yield Fault(shard.file, f"keys {low:09d} on, {follows:09d} should be next", f"{low:09d}")
            if high - low + 1 != shard.records + len(keys):
                yield Fault(
                    shard.file, f"{high - low + 1} keys lie between its ends, {shard.records} records are there"
                )
            follows = high + 1


def _records(folder: Path, shard: Shard, table: Table | None, first: int) -> Iterator[Fault]:
    """What is wrong with the first bad record of a shard whose bytes are what they were."""
    last_key = ""
    with open(folder / shard.file, "rb") as tar:
        for place in shard.offsets:
            tar.seek(place.json_offset)
            content = tar.read(place.st_offset + place.st_size - place.json_offset)
            try:
                record = decode(content[: place.json_size], content[place.st_offset - place.json_offset :])
            except Refused as refusal:
                yield Fault(shard.file, f"at byte {place.json_offset}: {refusal}")
                return
            what = _slip(record, shard, last_key)
            if what is None and table is not None:
                what = _differs(record, shard, table, first)
            if what:
                yield Fault(shard.file, what, record.key)
                return
            last_key, first = record.key, first + len(record.draws)
    if last_key != shard.last_key:
        yield Fault(shard.file, f"ends with key {last_key}, manifest says {shard.last_key}")


def _slip(record: Record, shard: Shard, last_key: str) -> str | None:
    draws = record.draws
    if record.key <= last_key or (not last_key and record.key != shard.first_key):
        return f"comes after {last_key or 'the beginning'}, and the shard should begin with {shard.first_key}"
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
    wanted = rows_of(record, shard.split, table.class_names.index(record.class_name))
    for name, values in wanted.items():
        try:
            found = table.column(name, slice(first, first + len(values)))
        except (Refused, KeyError) as error:
            return f"the table has no {name}: {error}"
        if found.dtype != values.dtype or not np.array_equal(found, values):
            return f"the table says another {name}"
    return None
