"""Every fault of a cache, by reading all of it; damaged files are moved aside, never deleted."""

import os
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import BinaryIO

import torch

from configs.values import PictureSize
from shards.archive import TAR_BLOCK_BYTES, Failure, Shard
from shards.codec import decode
from shards.files.local_copy import delete_stored, obtained
from shards.integrity import Damaged, Fault, read_at_most
from shards.journal import broken_entries, journal_faults
from shards.manifest import MANIFEST_FILE, Manifest
from shards.opened import comparable_shape
from shards.record import NOT_PER_STATE, SPLITS, Record, Split, is_latent, tensors_of
from shards.table import ShardTableRows, Table
from shards.table_check import TABLE_FOLDER as TABLE
from shards.writer import shard_file
from stages.system.disk import refuse_write_errors
from stages.system.refusal import Refused

COMPLETE_FILE = "COMPLETE"
QUARANTINE_FOLDER = "quarantine"
MAX_DIGITS = 20
Shapes = dict[str, tuple[int, ...]]


def inspect(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each fault of a cache: of its files, of what the shards leave out, of the journal, then of their records."""
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
    consistency, first = RecordConsistency(manifest.schema_version), 0
    unread = {shard.split for shard in manifest.shards if shard.size_in_name is None}
    for split in SPLITS:
        for shard in manifest.shards_of(split):
            if shard.file not in damaged or _has_right_bytes(folder, shard):
                rows = None if table is None else ShardTableRows(table, first, shard)
                for fault in _record_faults(folder, shard, rows, consistency):
                    unread.add(split)
                    yield fault
            else:
                unread.add(split)
            first += shard.draws
        if split not in unread:
            yield from consistency.key_faults(split, manifest.failures)


def _has_right_bytes(folder: Path, shard: Shard) -> bool:
    """Whether a faulty shard has the bytes of the manifest, so that its records tell what is wrong."""
    try:
        return shard.fault(folder) is None
    except Refused:
        return False


def completeness_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each shard and key that is missing or not in the manifest; a prompt that failed is not missing."""
    for split in SPLITS:
        shards = manifest.shards_of(split)
        for size in dict.fromkeys(shard.size_in_name for shard in shards):
            yield from _number_faults([shard for shard in shards if shard.size_in_name == size], split, size)
        if all(shard.size_in_name is None for shard in shards):  # else keys of the sizes lie among each other
            yield from _key_faults(shards, manifest.failures)
    known = {shard.file for shard in manifest.shards}
    for failure in manifest.failures:
        if failure.file not in known:
            yield Fault(failure.file, f"the manifest tells why {failure.key} failed, and does not name the shard")
    for file in sorted(f"data/{path.name}" for path in (folder / "data").glob("*.tar")):
        if file not in known:
            yield Fault(file, "is not in the manifest, and plain readers would read it")
    yield from _prompt_count_faults(folder, manifest)


def _number_faults(shards: Sequence[Shard], split: Split, size: PictureSize | None) -> Iterator[Fault]:
    """The first number that no shard of one size has."""
    for number, shard in enumerate(shards):
        if shard.file != (file := shard_file(split, number, size)):
            yield Fault(file, f"missing: {shard.file} is there - make the cache whole")
            return


def _key_faults(shards: Sequence[Shard], failures: tuple[Failure, ...]) -> Iterator[Fault]:
    """Keys that do not follow each other from shard to shard."""
    next_key: int | None = None
    for shard in shards:
        failed = [int(failure.key) for failure in failures if failure.file == shard.file]
        low, high = min([int(shard.first_key), *failed]), max([int(shard.last_key), *failed])
        if next_key is not None and low != next_key:
            yield Fault(shard.file, f"keys {low:09d} on, {next_key:09d} should be next", f"{low:09d}")
        if high - low + 1 != shard.records + len(failed):
            yield Fault(shard.file, f"{high - low + 1} keys lie between its ends, {shard.records} records are there")
        next_key = high + 1


def _prompt_count_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Whether a finished cache still has a record or a failure for as many prompts."""
    try:
        content = read_at_most(folder / COMPLETE_FILE, MAX_DIGITS).strip()
    except FileNotFoundError:
        return
    except (Damaged, OSError) as error:
        yield Fault(COMPLETE_FILE, str(error))
        return
    prompts = sum(shard.records for shard in manifest.shards) + len(manifest.failures)
    if not content.isdigit():
        yield Fault(COMPLETE_FILE, f"holds {content!r}, should hold the number of prompts")
    elif prompts < int(content):
        last = [shard.file for split in SPLITS for shard in manifest.shards_of(split)[-1:]]
        yield Fault(COMPLETE_FILE, f"{content.decode()} prompts were finished, now {prompts} are; last shards: {last}")


class RecordConsistency:
    """Whether all records have the schema of their cache, the same blocks, landings at the same times and, but for
    their size, the same shapes, and none comes twice."""

    def __init__(self, schema: int) -> None:
        self._schema = schema
        self._landing_times: tuple[str, list[float]] | None = None
        self._first_shapes: tuple[str, Shapes] | None = None
        self._keys: dict[tuple[int, str], str] = {}
        self._files: dict[str, list[str]] = {}  # key -> the shards of both splits that have it

    def mismatch(self, record: Record, file: str) -> str | None:
        """How this record does not fit to those before it."""
        key = f"{record.key} of {file}"
        if record.schema != self._schema:
            return f"is of schema {record.schema}, the cache of schema {self._schema}"
        shapes = {
            name: comparable_shape(
                name, tuple(values.shape if name in NOT_PER_STATE else values.shape[1:]), record.size
            )
            for name, values in tensors_of(record).items()
        }
        first_key, expected = self._first_shapes = self._first_shapes or (key, shapes)
        if list(expected.items()) != list(shapes.items()):
            differs = [n for n in expected.keys() | shapes.keys() if expected.get(n) != shapes.get(n)]
            name = min(differs, default="blocks")
            latent = record.size is not None and is_latent(name)
            now, first = (
                f"{shape[-2]} channels of {shape[-1]} pixels a place" if shape and latent else f"shape {shape}"
                for shape in (shapes.get(name), expected.get(name))
            )
            return f"{name} has {now}, record {first_key} has {first}"
        if record.landings is not None:
            times = record.landings.s.tolist()
            first_key, first_times = self._landing_times = self._landing_times or (key, times)
            if times != first_times:
                return f"has landings at {times}, record {first_key} has them at {first_times}"
        self._files.setdefault(record.key, []).append(file)
        twin = self._keys.setdefault((record.seed, record.text), key)
        return None if twin == key else f"has the text and the seed of record {twin}: the same record twice"

    def key_faults(self, split: Split, failures: Sequence[Failure]) -> Iterator[Fault]:
        """Each key of a split that several shards have, and the first that none has while a later one is there.

        The shards of one size have the keys of that size, so only all sizes together have every key.
        """
        in_split = f"data/{split}-"
        files = {key: [f for f in of_key if f.startswith(in_split)] for key, of_key in self._files.items()}
        for failure in failures:
            if failure.file.startswith(in_split):
                files.setdefault(failure.key, []).append(failure.file)
        keys = sorted(key for key, of_key in files.items() if of_key)
        for key in keys:
            if len(files[key]) > 1:
                yield Fault(files[key][-1], f"has key {key}, as {files[key][0]} has", key)
        for key, after in pairwise(keys):
            if int(after) != int(key) + 1:
                missing = int(keys[-1]) - int(keys[0]) + 1 - len(keys)
                reason = f"has key {after}, and no shard has {int(key) + 1:09d} ({missing} keys are in none)"
                yield Fault(files[after][0], reason, after)
                return


def _record_faults(
    folder: Path, shard: Shard, rows: ShardTableRows | None, consistency: RecordConsistency
) -> Iterator[Fault]:
    """What is wrong with the first bad record of a shard whose bytes are those of the manifest."""
    last_key = ""
    with obtained(folder / shard.file, shard.bytes) as path, open(path, "rb") as tar:
        for number, span in enumerate(shard.offsets):
            tar.seek(span.first)
            framed = tar.read(span.st_offset + span.st_size - span.first)
            content = framed[TAR_BLOCK_BYTES:]
            try:
                record = decode(content[: span.json_size], content[span.st_offset - span.json_offset :])
            except Refused as refusal:
                yield Fault(shard.file, f"at byte {span.json_offset}: {refusal}")
                return
            # The key by which plain readers of tars know the record.
            tar_key = framed[:100].rstrip(b"\0").decode("ascii", "replace").removesuffix(".json")
            fault = _record_fault(record, shard, last_key, tar_key) or consistency.mismatch(record, shard.file)
            if fault is None and rows is not None:
                fault = rows.mismatch(record, number)
            if fault:
                yield Fault(shard.file, fault, record.key)
                return
            last_key = record.key
        if fault := _tail_fault(tar, shard):
            yield Fault(shard.file, fault)
    if last_key != shard.last_key:
        yield Fault(shard.file, f"ends with key {last_key}, manifest says {shard.last_key}")


def _record_fault(record: Record, shard: Shard, last_key: str, tar_key: str) -> str | None:
    states = record.states
    if record.key == last_key:
        return "its key is there twice"
    if record.key <= last_key or (not last_key and record.key != shard.first_key):
        return f"comes after {last_key or 'the beginning'}, and the shard should begin with {shard.first_key}"
    if tar_key != record.key:
        return f"lies in the tar as {tar_key!r:.40}"
    if record.size != shard.size:
        return f"has size {record.size}, manifest says {shard.size}"
    if len(states) != shard.states_per_record:
        return f"{len(states)} states, manifest says {shard.states_per_record}"
    bad = [name for name, values in tensors_of(record).items() if not bool(torch.isfinite(values).all())]
    if bad:
        return f"{', '.join(bad)}: not finite"
    if not bool(((states.s >= 0) & (states.s <= 1)).all()) or int(states.k.min()) < 0:
        return "a time lies outside 0 to 1"
    if record.landings is not None:
        times = record.landings.s
        if float(times[0]) != 1 or float(times[-1]) <= 0 or bool((times.diff() >= 0).any()):
            return f"its landings lie at {times.tolist()}, which should fall from 1 and end above 0"
    return None


def _tail_fault(tar: BinaryIO, shard: Shard) -> str | None:
    """A tar ends with empty blocks: other readers would read a member behind the last record, this one would not."""
    end = shard.offsets[-1].last
    tar.seek(end)
    left = shard.bytes - end
    while left > 0 and (piece := tar.read(min(left, 1 << 20))):
        if piece.strip(b"\0"):
            return f"something lies behind its last record, from byte {end} on"
        left -= len(piece)
    return None


def quarantine(cache_folder: Path) -> list[Path]:
    """Move every damaged file of a cache into a fresh folder under CACHE/quarantine; returns their new paths.

    A table goes as a whole, and with a bad or lost manifest too: the journal holds the shards' checksums alone.
    """
    parent = cache_folder / QUARANTINE_FOLDER
    target = next(parent / f"{i:04d}" for i in count() if not (parent / f"{i:04d}").exists())
    moved = []
    for file in sorted({_blocking_path(cache_folder, file) for file in _damaged_files(cache_folder)}):
        if os.path.lexists(cache_folder / file):
            with refuse_write_errors(target / file):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (cache_folder / file).rename(target / file)
            delete_stored(cache_folder / file)  # else it is fetched again, as good as before
            moved.append(target / file)
    return moved


def _blocking_path(cache_folder: Path, file: str) -> str:
    """What must go so that a file can be made again: itself, or what stands where one of its folders should be."""
    for parent in reversed(Path(file).parents[:-1]):
        path = cache_folder / parent
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            return str(parent)
    return file


def _damaged_files(cache_folder: Path) -> Iterator[str]:
    try:
        manifest = Manifest.open(cache_folder) if os.path.lexists(cache_folder / MANIFEST_FILE) else None
    except Damaged:
        manifest = None
    if not manifest:
        yield from (MANIFEST_FILE, TABLE, *broken_entries(cache_folder))
    for fault in inspect(cache_folder, manifest) if manifest else ():
        yield TABLE if fault.file.startswith(TABLE) else fault.file
