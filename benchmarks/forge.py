"""Hostile caches: damaged bytes, or other bytes with which every checksum agrees."""

import copy
import hashlib
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs.zstd import Zstd

from configs.values import PictureSize
from shards.codec import encode
from shards.integrity import append_seal
from shards.manifest import Recipe
from shards.record import BlockFeatures, Record, States
from shards.table import write_table
from shards.writer import TAR_OWNER, CacheWriter

BLOCK = 512
DEEP = "deep"
ODD_VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**40, 2**53, 2**63, 2**64, 10**30, 10**400]
ODD_VALUES += [
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "0",
    "x" * 300,
    "../../x",
    "/etc/passwd",
    "data/../x",
]
ODD_VALUES += [
    "\ud800",
    "\x1b[2J\n",
    "٠" * 9,
    "000000001",
    "pickle",
    "gzip",
    [],
    {},
    [0],
    [1, 1],
    [[]],
    {"name": "zlib"},
    DEEP,
]
ODD_KEYS = [
    "consolidated_metadata",
    "sha256",
    "shape",
    "codecs",
    "name",
    "file",
    "__class__",
    "x" * 200,
    "\x00",
    "blocks",
]


def record(
    number: int, shape: tuple[int, ...] = (1, 2, 2), state_count: int = 2, blocks: tuple[str, ...] = ("mid", "up_0")
) -> Record:
    """A tiny record with values that no other has."""
    generator = torch.Generator().manual_seed(number)

    def half(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).half()

    times = torch.rand(state_count, generator=generator)
    states = [half(state_count, *shape) for _ in range(3)]
    kept = States((times * 999).long(), times, *states, torch.arange(state_count) % 2 == 0)
    features = BlockFeatures({block: half(state_count, 3) for block in blocks})
    words = (f"{number:09d}", f"star {number}", f"class/{number % 2}", number, 5.0)
    picture = half(*shape)
    size = PictureSize(8 * shape[2], 8 * shape[1]) if len(shape) == 3 else None
    return Record(*words, half(2, 3), picture, kept, features, size)


def shape_of(number: int, several_sizes: bool) -> tuple[int, ...]:
    """The latent's shape of a record of `make_cache`."""
    return (1, 2, 3) if several_sizes and number in (2, 3) else (1, 2, 2)


def make_cache(folder: Path, several_sizes: bool = False) -> None:
    """Two training shards of two records, of one size or of two, one of one for validation, and a table."""
    writer = CacheWriter(folder, Recipe(identity={"steps": 25, "teacher": {"sha256": "0" * 64}}))
    for split, index, numbers in (("train", 0, (0, 1)), ("train", 1, (2, 3)), ("validation", 0, (100,))):
        records = [record(number, shape_of(number, several_sizes)) for number in numbers]
        own_index, size = (0, records[0].size) if several_sizes else (index, None)
        writer.add(split, own_index, records, size=size)  # type: ignore[arg-type]
    write_table(folder)


def damage_bytes(rng: Random, content: bytes) -> bytes:
    """The same with one thing wrong: bits, a cut, a piece twice, moved, or of zeros."""
    bad, at = bytearray(content), rng.randrange(max(1, len(content)))
    size = rng.choice((1, 4, 8, 64, BLOCK))
    way = rng.randrange(7)
    if way <= 1 and bad:
        for _ in range(rng.choice((1, 1, 2, 5))):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    elif way == 2:
        del bad[at:]
    elif way == 3:
        bad[at:at] = bytes(rng.randrange(256) for _ in range(size))
    elif way == 4:
        del bad[at : at + size]
    elif way == 5:
        bad[at : at + size] = bad[rng.randrange(len(bad) + 1) :][:size]
    else:
        bad[at : at + size] = bytes(size) if rng.random() < 0.5 else b"\xff" * size
    return bytes(bad)


def tree_paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a JSON tree."""
    paths = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        paths += tree_paths(inner, (*path, key))
    return paths


def mutate_tree(rng: Random, tree: Any, times: int = 1) -> Any:
    """A JSON tree with something odd in it."""
    tree = copy.deepcopy(tree)
    for _ in range(times):
        ways = tree_paths(tree)
        if not ways:
            return tree
        *before, last = rng.choice(ways)
        parent = tree
        for key in before:
            parent = parent[key]
        way = rng.randrange(8)
        if way == 0:
            del parent[last]
        elif way == 1 and isinstance(parent, dict):
            parent[rng.choice(ODD_KEYS)] = copy.deepcopy(rng.choice([parent[last], *ODD_VALUES]))
        elif way == 1:
            parent.insert(last, copy.deepcopy(parent[last]))
        elif way <= 3 and type(parent[last]) is int:
            parent[last] += rng.choice((-512, -8, -1, 1, 8, 512, 2**20, 2**40))
        elif way == 4:
            other = tree
            for key in rng.choice(ways):
                other = other[key] if isinstance(other, (dict, list)) and _has(other, key) else other
            parent[last] = copy.deepcopy(other)
        else:
            parent[last] = copy.deepcopy(rng.choice(ODD_VALUES))
    return tree


def _has(tree: Any, key: Any) -> bool:
    return key in tree if isinstance(tree, dict) else isinstance(key, int) and key < len(tree)


def to_json(tree: Any, rng: Random | None = None, **form: Any) -> str:
    """JSON text of a tree; now and then a key is there twice, or something lies deep inside lists."""
    text = json.dumps(tree, **form).replace(f'"{DEEP}"', "[" * 900 + "]" * 900)
    if rng and rng.random() < 0.1 and ": " in text and "{" in text:
        at = text.index("{") + 1
        text = text[:at] + f'"{rng.choice(("key", "draws", "shape", "schema_version"))}": 7, ' + text[at:]
    return text


def manifest_text(tree: Any) -> str:
    """A manifest in the form in which it is written, sealed, as far as the tree still is one."""
    try:
        parts = [
            f'"schema_version": {to_json(tree["schema_version"])}',
            f'"recipe": {to_json(tree["recipe"], indent=1)}',
        ]
        for name in ("failures", "shards", "table"):
            listed = ",".join(f"\n {to_json(item)}" for item in tree[name])
            parts.append(f'"{name}": [{listed}{chr(10) * bool(listed)}]')
        parts += [f"{json.dumps(name)}: {to_json(tree[name])}" for name in sorted(tree.keys() - MANIFEST)]
        return append_seal("{\n" + ",\n".join(parts) + ",\n")
    except (KeyError, TypeError):
        return append_seal(to_json(tree, indent=1).removesuffix("\n}").removesuffix("]") + ",\n")


MANIFEST = {"schema_version", "recipe", "failures", "shards", "table", "sha256"}


def forge_record(rng: Random, number: int, own_shape: tuple[int, ...] = (1, 2, 2)) -> tuple[bytes, bytes]:
    """The two members of a record that is odd in one way, and agrees with itself in every other."""
    way = rng.randrange(6)
    if way == 0:
        shape = rng.choice(((1, 2, 2), (1, 1, 1), (2, 2), (4,), (1, 2, 3)))
        return encode(
            record(number, shape, rng.choice((1, 2, 3)), rng.choice((("mid",), ("mid", "up_0"), ("up_0", "mid"))))
        )
    metadata, tensors = encode(record(number, own_shape))
    if way == 1:
        return damage_bytes(rng, metadata), tensors
    if way == 2:
        return to_json(mutate_tree(rng, json.loads(metadata)), rng, sort_keys=True).encode(errors="replace"), tensors
    if way == 3:
        return metadata, damage_bytes(rng, tensors)
    size = int.from_bytes(tensors[:8], "little")
    header, body = json.loads(tensors[8 : 8 + size]), tensors[8 + size :]
    header = mutate_tree(rng, header, rng.choice((1, 1, 3)))
    if way == 5 and rng.random() < 0.5:
        header, body = _reshape_one_tensor(rng, json.loads(tensors[8 : 8 + size]))
    text = to_json(header, rng, separators=(",", ":")).encode(errors="replace")
    text += b" " * (-len(text) % 8)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, 2**16, 2**31, 2**63, 2**64 - 1))
    return metadata, struct.pack("<Q", length) + text + body


def _reshape_one_tensor(rng: Random, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A header in which one tensor has another shape, and every place follows from it."""
    name, at = rng.choice([*header]), 0
    header[name]["shape"] = rng.choice(
        ([], [0], [1], [2], [2, 0, 2], [1, 2, 2], [2, 1, 1, 1], [2, 3, 4], [1] * 9, [True, 2])
    )
    for entry in header.values():
        size = {"F16": 2, "F32": 4, "I64": 8, "BOOL": 1}[entry["dtype"]]
        end = at + size * int(np.prod(entry["shape"]))
        entry["data_offsets"], at = [at, end], end
    return header, bytes(at)


def forge_tar(rng: Random | None, members: list[tuple[str, bytes]]) -> tuple[bytes, list[int]]:
    """A tar, and where each member's content begins in it; with `rng` a header is odd now and then."""
    content, starts = io.BytesIO(), []
    for name, body in members:
        odd = rng.randrange(24) if rng else 24
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = len(body), 0o444, TAR_OWNER, TAR_OWNER
        if odd == 0:
            info.type = rng.choice(
                (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"L", b"x", b"g")
            )  # type: ignore[union-attr]
        elif odd == 1:
            info.name = rng.choice(
                ("../" + name, "/" + name, name.upper(), "a" * 90 + "/" + name, name[1:], "d/" + name)
            )  # type: ignore[union-attr]
        elif odd == 2:
            info.linkname = "/etc/passwd"
        elif odd == 3:
            info.size = rng.choice((0, 1, len(body) + 512, 8**11 - 1))  # type: ignore[union-attr]
        header = info.tobuf(
            tarfile.GNU_FORMAT if odd == 4 else tarfile.PAX_FORMAT if odd == 5 else tarfile.USTAR_FORMAT
        )
        header = damage_bytes(rng, header)[:BLOCK].ljust(BLOCK, b"\0") if odd == 6 and rng else header
        content.write(header)
        starts.append(content.tell())
        content.write(body + bytes(-len(body) % BLOCK))
    content.write(bytes(2 * BLOCK))
    content.write(bytes(-content.tell() % (20 * BLOCK)))
    return content.getvalue(), starts


def forge_entry(
    entry: dict[str, Any], tar: bytes, starts: list[int], members: list[tuple[str, bytes]]
) -> dict[str, Any]:
    """The manifest's entry of a forged shard, which agrees with it."""
    places = []
    for i in range(0, len(members), 2):
        json_start, tensors = starts[i], starts[i + 1]
        end = tensors + len(members[i + 1][1])
        crc32 = zlib.crc32(tar[json_start - BLOCK : -(-end // BLOCK) * BLOCK])
        places.append([json_start, len(members[i][1]), tensors, end - tensors, crc32])
    return {
        **entry,
        "records": len(places),
        "draws": entry["draws"] // entry["records"] * len(places),
        "bytes": len(tar),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "offsets": places,
    }


def pack_chunks(chunks: dict[int, bytes], count: int) -> bytes:
    """A file of the table with these chunks, by the specification of zarr's sharding."""
    body, index = b"", b""
    for number in range(count):
        if number in chunks:
            index += struct.pack("<QQ", len(body), len(chunks[number]) + 4)
            body += with_checksum(chunks[number])
        else:
            index += b"\xff" * 16
    return body + with_checksum(index)


def with_checksum(content: bytes) -> bytes:
    """The content and its crc32c."""
    return content + struct.pack("<I", google_crc32c.value(content))


def forge_table_file(rng: Random, content: bytes, chunk_bytes: int) -> bytes:
    """A file of the table that agrees with itself, and unpacks to something else, or to much too much."""
    chunks = len(content) and 16
    way = rng.randrange(8)
    values = bytes(rng.randrange(256) for _ in range(64)).ljust(chunk_bytes, b"\0")
    frame = bytes(Zstd(level=3).encode(values))
    if way == 0:
        return pack_chunks({0: frame}, chunks)
    if way == 1:
        return pack_chunks({0: BOMB}, chunks)
    if way == 2:  # the header claims another size than the frame has
        return pack_chunks(
            {
                0: b"\x28\xb5\x2f\xfd\xe0"
                + struct.pack("<Q", rng.choice((0, 1, chunk_bytes, 10**10, 2**63)))
                + frame[7:]
            },
            chunks,
        )
    if way == 3:
        return pack_chunks({0: damage_bytes(rng, frame)}, chunks)
    if way == 4:
        return pack_chunks({}, chunks)
    if way == 5:
        return pack_chunks({0: frame, 1: frame, 15: frame}, chunks)
    if way == 6:
        return pack_chunks({0: frame + BOMB}, chunks)
    body, index = content[:-260], bytearray(content[-260:-4])
    struct.pack_into(
        "<Q", index, 8 * rng.randrange(32), rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(content)))
    )
    return body + with_checksum(bytes(index))


def bomb(size: int) -> bytes:
    """A zstd frame that unpacks to `size` zeros (RFC 8878): for every 128 KiB of them it has four bytes."""
    left, blocks = size, b""
    while left:
        part = min(left, 128 << 10)
        left -= part
        blocks += struct.pack("<I", part << 3 | 1 << 1 | (not left))[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + blocks


BOMB = bomb(1 << 27)
