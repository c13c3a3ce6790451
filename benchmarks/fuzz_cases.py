"""One kind of hostile case each: what is done to a small cache, and what may come of it.

A case returns a word for its outcome. Anything else than a correct reading or a refusal that names the file (or, where
only bytes are known, the record) is raised.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs.zstd import Zstd

from benchmarks import forge
from shards import table_check
from shards.archive import record_spans
from shards.codec import decode, encode
from shards.journal import ShardJournal
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import SCHEMA, SPLITS, Record
from shards.table import Table
from shards.verify import inspect
from stages.system.refusal import Refused

SAME, FORGED, REFUSED = "read as written", "read as forged", "refused, named"


class Misread(Exception):
    """Something was read that is not there, damage went unseen, or a refusal names nothing."""


class FuzzCache:
    """A whole cache on the disk, and its bytes to restore it from."""

    def __init__(self, folder: Path, several_sizes: bool = False) -> None:
        self.cache, self._several_sizes = folder / "cache", several_sizes
        forge.make_cache(self.cache, several_sizes)
        self.expected = {
            "train": [encode(self.record(number)) for number in range(4)],
            "validation": [encode(self.record(100))],
        }
        self.files = {
            str(path.relative_to(self.cache)): path.read_bytes() for path in self.cache.rglob("*") if path.is_file()
        }
        self.manifest: dict[str, Any] = json.loads(self.files["manifest.json"])
        self.largest = max(
            len(metadata) + len(tensors) for records in self.expected.values() for metadata, tensors in records
        )
        self.table = self._read_columns()

    def record(self, number: int) -> Record:
        """The record of this number."""
        return forge.record(number, self.shape_of(number))

    def shape_of(self, number: int) -> tuple[int, ...]:
        """The shape of its latents."""
        return forge.shape_of(number, self._several_sizes)

    @contextmanager
    def replace_files(self, changed: dict[str, bytes | None]) -> Iterator[None]:
        """The cache with other bytes in these files, None for none, until the context ends."""
        try:
            for file, content in changed.items():
                self.write_file(file, content)
            yield
        finally:
            for file in changed:
                self.write_file(file, self.files.get(file))

    def write_file(self, file: str, content: bytes | None) -> None:
        path = self.cache / file
        if path.is_symlink() or path.is_fifo():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)

    def manifest_bytes(self, tree: Any) -> bytes:
        return forge.manifest_text(tree).encode(errors="replace")

    def _read_columns(self) -> dict[str, np.ndarray]:
        table = Table.open(self.cache)
        return {name: table.column(name) for name in columns_of(table)}


def columns_of(table: Table) -> list[str]:
    return [*table_check.columns_of(SCHEMA), *(f"feature_{block}" for block in table.blocks)]


def read_shards_directly(cache: Path, split: str) -> list[Record]:
    """The records of a split, cut out of the shards as the manifest says and decoded one by one."""
    result = []
    for shard in json.loads((cache / "manifest.json").read_bytes())["shards"]:
        if shard["split"] == split:
            tar = (cache / shard["file"]).read_bytes()
            for first, size, second, length, _ in shard["offsets"]:
                result.append(decode(tar[first : first + size], tar[second : second + length]))
    return result


def read_everything(cache: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    """Read a cache in every way that training does, and check each row against `truth`."""
    result = {}
    for split in SPLITS:
        if not Manifest.open(cache).shards_of(split):
            continue
        for budget in (1 << 30, 0):
            reader = Reader(cache, split, batch_size=16, workers=0, memory_budget_bytes=budget)
            batches = list(islice(reader.batches(), 2 * len(reader.sizes)))
            wanted = read_shards_directly(cache, split)
            for batch in batches:
                for row in range(len(batch)):
                    if not any(_row_equals(batch, row, record) for record in wanted if record.key == batch.keys[row]):
                        raise Misread(
                            f"row {row} of {split} is not state {int(batch.state_index[row])} of {batch.keys[row]}"
                        )
        result[split] = [encode(record) for record in reader.records()]
        if result[split] != [encode(record) for record in wanted]:
            raise Misread(f"records of {split}")
    return result


def _row_equals(batch: Any, row: int, record: Record) -> bool:
    index = int(batch.state_index[row])
    if index >= len(record.states) or (batch.texts[row], batch.class_names[row]) != (record.text, record.class_name):
        return False
    pairs = [(batch.cond[row], record.cond)]
    pairs += [
        (getattr(batch, name)[row], getattr(record.states, name)[index])
        for name in ("x_s", "v_cond", "v_uncond", "s", "k")
    ]
    pairs += [(batch.features[block][row], values[index]) for block, values in record.features.by_block.items()]
    return list(batch.features) == list(record.features.by_block) and all(_bits_equal(a, b) for a, b in pairs)


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def catch_refusal(act: Callable[[], Any], *names: str) -> tuple[bool, Any]:
    """Whether an act is refused, and else what it returns; a refusal must name one of these."""
    try:
        return False, act()
    except Refused as refusal:
        if not any(name in str(refusal) for name in names):
            raise Misread(f"a refusal that names none of {names}: {refusal}") from refusal
        return True, None


def damage_codec(rng: Random, world: FuzzCache) -> str:
    """The bytes of a record, damaged."""
    members = list(encode(world.record(rng.randrange(4))))
    which = rng.randrange(2)
    members[which] = forge.damage_bytes(rng, members[which])
    return _check_decoding(world, members[0], members[1])


def forge_codec(rng: Random, world: FuzzCache) -> str:
    """The bytes of a record that agree with themselves."""
    number = rng.randrange(4)
    return _check_decoding(world, *forge.forge_record(rng, number, world.shape_of(number)))


def _check_decoding(world: FuzzCache, metadata: bytes, tensors: bytes) -> str:
    refused, record = catch_refusal(lambda: decode(metadata, tensors), "record")
    if refused:
        return REFUSED
    if encode(record) != (metadata, tensors):
        raise Misread("decoded to a record that is stored in other bytes")
    return SAME if (metadata, tensors) in world.expected["train"] else FORGED


def damage_file(rng: Random, world: FuzzCache) -> str:
    """One file of the cache, damaged: detected by reading everything, and by verify."""
    file = rng.choice([file for file in world.files if "journal" not in file])
    bad = forge.damage_bytes(rng, world.files[file])
    if bad == world.files[file]:
        return SAME
    with world.replace_files({file: bad}):
        refused, _ = catch_refusal(
            lambda: (read_everything(world.cache), _read_columns(world)), file, "manifest.json", "table.zarr"
        )
        try:
            result = bool(list(inspect(world.cache, Manifest.open(world.cache))))
        except Refused:
            result = True
    if not refused or not result:
        raise Misread(f"{file}: damage not seen by {'verify' if refused else 'reading'}")
    return REFUSED


def _read_columns(world: FuzzCache) -> dict[str, np.ndarray]:
    table = Table.open(world.cache)
    return {name: table.column(name) for name in columns_of(table)}


def forge_shard(rng: Random, world: FuzzCache) -> str:
    """A shard with odd records, or a tar with odd headers, and a manifest that agrees with it."""
    at = rng.randrange(len(world.manifest["shards"]))
    entry = world.manifest["shards"][at]
    first = int(entry["first_key"])
    odd_tar = rng.random() < 0.4
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + entry["records"]):
        odd = not odd_tar and (rng.random() < 0.6 or number == first)
        if odd:
            metadata, tensors = forge.forge_record(rng, number, world.shape_of(number))
        else:
            metadata, tensors = encode(world.record(number))
        members += [(f"{number:09d}.json", metadata), (f"{number:09d}.safetensors", tensors)]
    tar, starts = forge.forge_tar(rng if odd_tar else None, members)
    tree = {**world.manifest, "shards": list(world.manifest["shards"])}
    tree["shards"][at] = forge.forge_entry(entry, tar, starts, members)
    if rng.random() < 0.3:
        tree["shards"][at]["draws"] = entry["records"] * rng.choice((1, 3, 7, 2**20, 2**40))
    with world.replace_files({entry["file"]: tar, "manifest.json": world.manifest_bytes(tree)}):
        return _read_and_verify(world)


def forge_manifest(rng: Random, world: FuzzCache) -> str:
    """A manifest with odd values and a good seal."""
    tree = forge.mutate_tree(rng, world.manifest, rng.choice((1, 1, 2)))
    with world.replace_files({"manifest.json": world.manifest_bytes(tree)}):
        return _read_and_verify(world)


def _read_and_verify(world: FuzzCache) -> str:
    """Read a forged cache in every way, and verify it: no way may crash, and each tells what is there."""
    refused, read = catch_refusal(
        lambda: read_everything(world.cache), "data/", "manifest.json", "record", "holds no record"
    )
    catch_refusal(
        lambda: [fault.message(world.cache) for fault in inspect(world.cache, Manifest.open(world.cache))],
        "manifest.json",
    )
    catch_refusal(lambda: _read_columns(world), "table.zarr", "manifest.json")
    return REFUSED if refused else SAME if read == world.expected else FORGED


def damage_tar(rng: Random, world: FuzzCache) -> str:
    """A tar alone: the spans read from it are those of whole members, as Python's own tarfile sees them."""
    import tarfile  # the oracle alone

    members = [
        (f"{n:09d}.{kind}", body)
        for n in range(3)
        for kind, body in zip(("json", "safetensors"), encode(world.record(n)), strict=True)
    ]
    tar, _ = forge.forge_tar(rng, members)
    if rng.random() < 0.5:
        tar = forge.damage_bytes(rng, tar)
    path = world.cache / "data" / "odd.tar"
    path.write_bytes(tar)
    try:
        result = record_spans(path)
        for key, place in result.items():
            for extension, first, size in (
                ("json", place.json_offset, place.json_size),
                ("safetensors", place.st_offset, place.st_size),
            ):
                info = tarfile.TarInfo.frombuf(tar[first - 512 : first], "utf-8", "strict")
                if (info.name, info.size, info.isreg()) != (f"{key}.{extension}", size, True) or first + size > len(
                    tar
                ):
                    raise Misread(f"place {place} of {key}: {info}")
    finally:
        path.unlink()
    return SAME if len(result) == 3 else REFUSED


def forge_table(rng: Random, world: FuzzCache) -> str:
    """A description or a file of the table with odd content, and a manifest that agrees with it."""
    described = rng.random() < 0.5
    ending = "zarr.json" if described else "/0"
    file = rng.choice([file for file in world.files if file.startswith("table.zarr") and file.endswith(ending)])
    name = file.split("/")[1]
    if described:
        text = forge.to_json(
            forge.mutate_tree(rng, json.loads(world.files[file]), rng.choice((1, 1, 2))), rng, indent=2
        )
        content: bytes | None = text.encode(errors="replace")
    else:
        content = forge.forge_table_file(rng, world.files[file], 1024 * world.table[name][0].nbytes)
        content = None if rng.random() < 0.05 else content
    tree = {**world.manifest, "table": [dict(part) for part in world.manifest["table"]]}
    tree["table"] = [part for part in tree["table"] if part["file"] != file or content is not None]
    for part in tree["table"]:
        if part["file"] == file and content is not None:
            part["bytes"], part["sha256"] = len(content), forge.hashlib.sha256(content).hexdigest()
    with world.replace_files({file: content, "manifest.json": world.manifest_bytes(tree)}):
        refused, read = catch_refusal(lambda: _read_columns(world), "table.zarr", "manifest.json")
        catch_refusal(lambda: list(inspect(world.cache, Manifest.open(world.cache))), "manifest.json")
    if refused:
        return REFUSED
    wanted = dict(world.table)
    if not described:
        wanted[name] = _unpack_rows(content, world.table[name])
    if any(not np.array_equal(read[one].view("B"), values.view("B")) for one, values in wanted.items()):
        raise Misread(f"{file}: other values than are written")
    return SAME if described else FORGED


def _unpack_rows(content: bytes | None, like: np.ndarray) -> np.ndarray:
    """The first rows of a file of the table, unpacked without zarr."""
    first, size = (2**64 - 1,) * 2 if content is None else forge.struct.unpack_from("<QQ", content[-260:])
    if content is None or first == 2**64 - 1:
        return np.zeros_like(like)
    frame, checksum = content[first : first + size - 4], content[first + size - 4 : first + size]
    if forge.struct.pack("<I", google_crc32c.value(frame)) != checksum:
        raise Misread("a wrong checksum was believed")
    return np.frombuffer(Zstd().decode(frame), like.dtype)[: like.size].reshape(like.shape)


def forge_journal(rng: Random, world: FuzzCache) -> str:
    """An entry of the journal, damaged or odd."""
    file = rng.choice([file for file in world.files if file.startswith("journal/")])
    tree = json.loads(world.files[file])
    if rng.random() < 0.5:
        bad = forge.damage_bytes(rng, world.files[file])
    else:
        bad = (forge.to_json(forge.mutate_tree(rng, tree), rng, separators=(",", ":")) + "\n").encode(errors="replace")
    fingerprint = Manifest.open(world.cache).recipe.fingerprint()
    with world.replace_files({file: bad}):
        refused, result = catch_refusal(lambda: ShardJournal(world.cache, fingerprint).entries(), file)
    if refused:
        return REFUSED
    entry = result.get(tree["shard"]["file"])
    if len(result) - bool(entry) != 2:
        raise Misread(f"{file}: {len(result)} entries of 3 left")
    return "left out" if entry is None else SAME if json.loads(entry.model_dump_json()) == tree else FORGED


def replace_with_odd_file(rng: Random, world: FuzzCache) -> str:
    """A file that is no file: a link, a pipe, a folder, a device, missing, another's, or of another size."""
    file = rng.choice([file for file in world.files if "journal" not in file])
    path, way = world.cache / file, rng.randrange(8)
    with world.replace_files({file: None}):
        if way == 0:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/urandom", "/etc/passwd", "/nowhere")))
        elif way == 1:
            os.mkfifo(path)
        elif way == 2:
            path.mkdir()
        elif way == 3:
            path.write_bytes(rng.choice([other for other in world.files.values() if other != world.files[file]]))
        elif way == 4:
            path.write_bytes(b"")
            os.truncate(path, rng.choice((len(world.files[file]) + 1, 1 << 20, 1 << 40)))
        elif way == 5:
            elsewhere = world.cache.parent / "elsewhere"
            elsewhere.write_bytes(world.files[file])
            path.symlink_to(elsewhere)
        elif way == 6:
            path.write_bytes(world.files[file] + bytes(rng.choice((1, 512, 10240))))
        refused, _ = catch_refusal(
            lambda: (read_everything(world.cache), _read_columns(world)), file, "manifest.json", "table.zarr"
        )
        try:
            faults = list(inspect(world.cache, Manifest.open(world.cache)))
        except Refused:
            faults = [None]  # type: ignore[list-item]
    if not refused or not faults:
        raise Misread(f"{file}: way {way} not seen by {'verify' if refused else 'reading'}")
    return REFUSED


KINDS: dict[str, tuple[Callable[[Random, FuzzCache], str], int]] = {
    "record, damaged": (damage_codec, 32),
    "record, forged": (forge_codec, 32),
    "tar, odd headers": (damage_tar, 14),
    "any file, damaged": (damage_file, 4),
    "shard, forged": (forge_shard, 5),
    "manifest, forged": (forge_manifest, 6),
    "table, forged": (forge_table, 3),
    "journal, forged": (forge_journal, 2),
    "link, pipe, device, ...": (replace_with_odd_file, 2),
}
"""Kind -> the case, and how many of a hundred are of it."""
