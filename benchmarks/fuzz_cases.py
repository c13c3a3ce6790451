"""One kind of hostile case each: what is done to a small cache, and what may come of it.

A case returns a word for its outcome. Anything else than a correct reading or a refusal that names the file (or, where
only bytes are known, the record) is raised.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs.zstd import Zstd

from benchmarks import forge
from configs.refusal import Refused
from shards.archive import places
from shards.codec import decode, encode
from shards.inspection import inspect
from shards.journal import Journal
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import SPLITS, Record
from shards.table import Table

SAME, FORGED, REFUSED = "read as written", "read as forged", "refused, named"


class Misread(Exception):
    """Something was read that is not there, damage went unseen, or a refusal names nothing."""


class World:
    """A whole cache on the disk, and its bytes to restore it from."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        forge.make_cache(self.cache)
        self.files = {
            str(path.relative_to(self.cache)): path.read_bytes() for path in self.cache.rglob("*") if path.is_file()
        }
        self.manifest: dict[str, Any] = json.loads(self.files["manifest.json"])
        self.largest = max(
            len(said) + len(tensors) for said, tensors in map(encode, map(forge.record, (0, 1, 2, 3, 100)))
        )
        self.table = self._columns()

    @contextmanager
    def holding(self, changed: dict[str, bytes | None]) -> Iterator[None]:
        """The cache with other bytes in these files, None for none, until the context ends."""
        try:
            for file, content in changed.items():
                self.put(file, content)
            yield
        finally:
            for file in changed:
                self.put(file, self.files.get(file))

    def put(self, file: str, content: bytes | None) -> None:
        path = self.cache / file
        if path.is_symlink() or path.is_fifo():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)

    def with_manifest(self, tree: Any) -> bytes:
        return forge.manifest_text(tree).encode(errors="replace")

    def _columns(self) -> dict[str, np.ndarray]:
        table = Table.open(self.cache)
        return {name: table.column(name) for name in columns_of(table)}


def columns_of(table: Table) -> list[str]:
    return ["key", "split", "draw", "k", "s", "class", *(f"feature_{block}" for block in table.blocks)]


def truth(cache: Path, split: str) -> list[Record]:
    """The records of a split, cut out of the shards as the manifest says and decoded one by one."""
    found = []
    for shard in json.loads((cache / "manifest.json").read_bytes())["shards"]:
        if shard["split"] == split:
            tar = (cache / shard["file"]).read_bytes()
            for first, size, second, length, _ in shard["offsets"]:
                found.append(decode(tar[first : first + size], tar[second : second + length]))
    return found


def use(cache: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    """Read a cache in every way that training does, and check each row against `truth`."""
    found = {}
    for split in SPLITS:
        if not Manifest.open(cache).of(split):
            continue
        for budget in (1 << 30, 0):
            reader = Reader(cache, split, batch_size=1, workers=0, memory_budget_bytes=budget)
            batch = reader.batch(np.arange(min(32, reader.samples_per_epoch)))
            wanted = truth(cache, split)
            for row in range(len(batch)):
                if not any(_row_is(batch, row, record) for record in wanted if record.key == batch.keys[row]):
                    raise Misread(f"row {row} of {split} is not draw {int(batch.draw[row])} of {batch.keys[row]}")
        found[split] = [encode(record) for record in reader.records()]
        if found[split] != [encode(record) for record in wanted]:
            raise Misread(f"records of {split}")
    return found


def _row_is(batch: Any, row: int, record: Record) -> bool:
    draw = int(batch.draw[row])
    if draw >= len(record.draws) or (batch.texts[row], batch.class_names[row]) != (record.text, record.class_name):
        return False
    pairs = [(batch.cond[row], record.cond)]
    pairs += [
        (getattr(batch, name)[row], getattr(record.draws, name)[draw])
        for name in ("x_t", "v_cond", "v_uncond", "s", "k")
    ]
    pairs += [(batch.features[block][row], values[draw]) for block, values in record.features.by_block.items()]
    return list(batch.features) == list(record.features.by_block) and all(_alike(a, b) for a, b in pairs)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def refused(act: Callable[[], Any], *names: str) -> tuple[bool, Any]:
    """Whether an act is refused, and else what it returns; a refusal must name one of these."""
    try:
        return False, act()
    except Refused as refusal:
        if not any(name in str(refusal) for name in names):
            raise Misread(f"a refusal that names none of {names}: {refusal}") from refusal
        return True, None


def codec_damaged(rng: Random, world: World) -> str:
    """The bytes of a record, damaged."""
    members = list(encode(forge.record(rng.randrange(4))))
    which = rng.randrange(2)
    members[which] = forge.damaged(rng, members[which])
    return _decoded(members[0], members[1])


def codec_forged(rng: Random, world: World) -> str:
    """The bytes of a record that agree with themselves."""
    return _decoded(*forge.forged_record(rng, rng.randrange(4)))


def _decoded(said: bytes, tensors: bytes) -> str:
    no, record = refused(lambda: decode(said, tensors), "record")
    if no:
        return REFUSED
    if encode(record) != (said, tensors):
        raise Misread("decoded to a record that is stored in other bytes")
    return SAME if (said, tensors) in ORIGINAL else FORGED


ORIGINAL = {encode(forge.record(number)) for number in range(4)}


def files_damaged(rng: Random, world: World) -> str:
    """One file of the cache, damaged: found by reading everything, and by verify."""
    file = rng.choice([file for file in world.files if "journal" not in file])
    bad = forge.damaged(rng, world.files[file])
    if bad == world.files[file]:
        return SAME
    with world.holding({file: bad}):
        no, _ = refused(lambda: (use(world.cache), _all_columns(world)), file, "manifest.json", "table.zarr")
        try:
            found = bool(list(inspect(world.cache, Manifest.open(world.cache))))
        except Refused:
            found = True
    if not no or not found:
        raise Misread(f"{file}: damage not seen by {'verify' if no else 'reading'}")
    return REFUSED


def _all_columns(world: World) -> dict[str, np.ndarray]:
    table = Table.open(world.cache)
    return {name: table.column(name) for name in columns_of(table)}


def shard_forged(rng: Random, world: World) -> str:
    """A shard with odd records, or a tar with odd headers, and a manifest that agrees with it."""
    at = rng.randrange(len(world.manifest["shards"]))
    entry = world.manifest["shards"][at]
    first = int(entry["first_key"])
    odd_tar = rng.random() < 0.4
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + entry["records"]):
        odd = not odd_tar and (rng.random() < 0.6 or number == first)
        said, tensors = forge.forged_record(rng, number) if odd else encode(forge.record(number))
        members += [(f"{number:09d}.json", said), (f"{number:09d}.safetensors", tensors)]
    tar, starts = forge.tar_of(rng if odd_tar else None, members)
    tree = {**world.manifest, "shards": list(world.manifest["shards"])}
    tree["shards"][at] = forge.entry_of(entry, tar, starts, members)
    if rng.random() < 0.3:
        tree["shards"][at]["draws"] = entry["records"] * rng.choice((1, 3, 7, 2**20, 2**40))
    with world.holding({entry["file"]: tar, "manifest.json": world.with_manifest(tree)}):
        return _used(world)


def manifest_forged(rng: Random, world: World) -> str:
    """A manifest with odd values and a good seal."""
    tree = forge.changed(rng, world.manifest, rng.choice((1, 1, 2)))
    with world.holding({"manifest.json": world.with_manifest(tree)}):
        return _used(world)


def _used(world: World) -> str:
    """Read a forged cache in every way, and verify it: no way may crash, and each tells what is there."""
    no, read = refused(lambda: use(world.cache), "data/", "manifest.json", "record", "holds no record")
    refused(
        lambda: [fault.told(world.cache) for fault in inspect(world.cache, Manifest.open(world.cache))], "manifest.json"
    )
    refused(lambda: _all_columns(world), "table.zarr", "manifest.json")
    return REFUSED if no else SAME if read == WHOLE else FORGED


WHOLE = {
    "train": [encode(forge.record(number)) for number in range(4)],
    "validation": [encode(forge.record(100))],
}


def tar_damaged(rng: Random, world: World) -> str:
    """A tar alone: the places found in it are those of whole members, as Python's own tarfile sees them."""
    import tarfile  # the oracle alone

    members = [
        (f"{n:09d}.{kind}", body)
        for n in range(3)
        for kind, body in zip(("json", "safetensors"), encode(forge.record(n)), strict=True)
    ]
    tar, _ = forge.tar_of(rng, members)
    if rng.random() < 0.5:
        tar = forge.damaged(rng, tar)
    path = world.cache / "data" / "odd.tar"
    path.write_bytes(tar)
    try:
        found = places(path)
        for key, place in found.items():
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
    return SAME if len(found) == 3 else REFUSED


def table_forged(rng: Random, world: World) -> str:
    """A description or a file of the table with odd content, and a manifest that agrees with it."""
    described = rng.random() < 0.5
    ending = "zarr.json" if described else "/0"
    file = rng.choice([file for file in world.files if file.startswith("table.zarr") and file.endswith(ending)])
    name = file.split("/")[1]
    if described:
        text = forge.written(forge.changed(rng, json.loads(world.files[file]), rng.choice((1, 1, 2))), rng, indent=2)
        content: bytes | None = text.encode(errors="replace")
    else:
        content = forge.forged_file(rng, world.files[file], 1024 * world.table[name][0].nbytes)
        content = None if rng.random() < 0.05 else content
    tree = {**world.manifest, "table": [dict(part) for part in world.manifest["table"]]}
    tree["table"] = [part for part in tree["table"] if part["file"] != file or content is not None]
    for part in tree["table"]:
        if part["file"] == file and content is not None:
            part["bytes"], part["sha256"] = len(content), forge.hashlib.sha256(content).hexdigest()
    with world.holding({file: content, "manifest.json": world.with_manifest(tree)}):
        no, read = refused(lambda: _all_columns(world), "table.zarr", "manifest.json")
        refused(lambda: list(inspect(world.cache, Manifest.open(world.cache))), "manifest.json")
    if no:
        return REFUSED
    wanted = dict(world.table)
    if not described:
        wanted[name] = _unpacked(content, world.table[name])
    if any(not np.array_equal(read[one].view("B"), values.view("B")) for one, values in wanted.items()):
        raise Misread(f"{file}: other values than are written")
    return SAME if described else FORGED


def _unpacked(content: bytes | None, like: np.ndarray) -> np.ndarray:
    """The first rows of a file of the table, unpacked without zarr."""
    first, size = (2**64 - 1,) * 2 if content is None else forge.struct.unpack_from("<QQ", content[-260:])
    if content is None or first == 2**64 - 1:
        return np.zeros_like(like)
    frame, told = content[first : first + size - 4], content[first + size - 4 : first + size]
    if forge.struct.pack("<I", google_crc32c.value(frame)) != told:
        raise Misread("a wrong checksum was believed")
    return np.frombuffer(Zstd().decode(frame), like.dtype)[: like.size].reshape(like.shape)


def journal_forged(rng: Random, world: World) -> str:
    """An entry of the journal, damaged or odd."""
    file = rng.choice([file for file in world.files if file.startswith("journal/")])
    tree = json.loads(world.files[file])
    if rng.random() < 0.5:
        bad = forge.damaged(rng, world.files[file])
    else:
        bad = (forge.written(forge.changed(rng, tree), rng, separators=(",", ":")) + "\n").encode(errors="replace")
    fingerprint = Manifest.open(world.cache).recipe.fingerprint()
    with world.holding({file: bad}):
        no, found = refused(lambda: Journal(world.cache, fingerprint).entries(), file)
    if no:
        return REFUSED
    entry = found.get(tree["shard"]["file"])
    if len(found) - bool(entry) != 2:
        raise Misread(f"{file}: {len(found)} entries of 3 left")
    return "left out" if entry is None else SAME if json.loads(entry.model_dump_json()) == tree else FORGED


def files_odd(rng: Random, world: World) -> str:
    """A file that is no file: a link, a pipe, a folder, a device, missing, another's, or of another size."""
    file = rng.choice([file for file in world.files if "journal" not in file])
    path, way = world.cache / file, rng.randrange(8)
    with world.holding({file: None}):
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
        no, _ = refused(lambda: (use(world.cache), _all_columns(world)), file, "manifest.json", "table.zarr")
        try:
            faults = list(inspect(world.cache, Manifest.open(world.cache)))
        except Refused:
            faults = [None]  # type: ignore[list-item]
    if not no or not faults:
        raise Misread(f"{file}: way {way} not seen by {'verify' if no else 'reading'}")
    return REFUSED


KINDS: dict[str, tuple[Callable[[Random, World], str], int]] = {
    "record, damaged": (codec_damaged, 32),
    "record, forged": (codec_forged, 32),
    "tar, odd headers": (tar_damaged, 14),
    "any file, damaged": (files_damaged, 4),
    "shard, forged": (shard_forged, 5),
    "manifest, forged": (manifest_forged, 6),
    "table, forged": (table_forged, 3),
    "journal, forged": (journal_forged, 2),
    "link, pipe, device, ...": (files_odd, 2),
}
"""Kind -> the case, and how many of a hundred are of it."""
