"""The files of a table, checked before zarr reads them, because zarr allocates what an untrusted file claims.

A file ends with an index: the first byte and size of each chunk, then a checksum. A chunk is a zstd frame and a
checksum; the unpacked size that it claims must be the one of its array. The description of an array is accepted in
exactly one form: no other codec, shape, fill value, or description inside another one.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shards.archive import TableEntry
from shards.codec import BLOCK_NAME, MAX_BLOCKS
from shards.integrity import Damaged, checked_path, open_plain_file, read_at_most, repair_hint
from shards.manifest import Manifest
from stages.system.refusal import Refused

TABLE_FOLDER = "table.zarr"
COLUMNS = {"key": "int64", "split": "int8", "draw": "int16", "k": "int64", "s": "float32", "class": "int32"}
SIZE_COLUMNS = {"width": "int32", "height": "int32"}
"""Of the picture, in pixels; schema 1 has no such columns."""
FEATURE_PREFIX, FEATURE_TYPE = "feature_", "float16"
ITEM_BYTES = {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "float32": 4, "float16": 2}
MAX_ARRAY_JSON_BYTES, MAX_GROUP_JSON_BYTES = 1 << 13, 1 << 24
MAX_FILE_ROWS, MAX_CHUNK_BYTES = 1 << 16, 1 << 26
"""Of SD1.5's widest block a chunk has 2.6 MB."""

INDEX_ENTRY = struct.Struct("<QQ")
ABSENT_CHUNK = (1 << 64) - 1
"""First byte and size of a chunk that is not stored and holds the fill value."""
CHECKSUM_BYTES = 4
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_FRAME_HEADER_BYTES = 18
DICTIONARY_ID_BYTES, CONTENT_SIZE_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)
BLOCK_HEADER_BYTES, RLE_BLOCK = 3, 1


def columns_of(schema: int) -> dict[str, str]:
    """Name and type of each column beside the features."""
    return COLUMNS | (SIZE_COLUMNS if schema > 1 else {})


class ChunkLayout(NamedTuple):
    """How one array is packed."""

    chunks: int
    """in each file"""
    chunk_bytes: int
    """of each chunk, unpacked"""


def chunk_fault(file: Path, layout: ChunkLayout) -> str | None:
    """What is wrong with one file of an array."""
    index_bytes = layout.chunks * INDEX_ENTRY.size + CHECKSUM_BYTES
    with open(file, "rb", opener=open_plain_file) as content:
        end = os.fstat(content.fileno()).st_size - index_bytes
        if end < 0:
            return f"is too short for an index of {layout.chunks} chunks"
        content.seek(end)
        for number, (first, size) in enumerate(INDEX_ENTRY.iter_unpack(content.read(index_bytes - CHECKSUM_BYTES))):
            if (first, size) == (ABSENT_CHUNK, ABSENT_CHUNK):
                continue
            if first + size > end or not CHECKSUM_BYTES < size <= _max_compressed_bytes(layout.chunk_bytes):
                return f"chunk {number} lies at bytes {first} to {first + size}, the index begins at {end}"
            try:
                unpacked = unpacked_bytes(content, first, first + size - CHECKSUM_BYTES)
            except ValueError as error:
                return f"chunk {number} at byte {first}: {error}"
            if unpacked != layout.chunk_bytes:
                return f"chunk {number} at byte {first} claims {unpacked} bytes unpacked, not {layout.chunk_bytes}"
    return None


def unpacked_bytes(content: BinaryIO, first: int, last: int) -> int:
    """The unpacked size that the header of a zstd frame claims (RFC 8878, 3.1.1).

    Raises `ValueError` unless exactly one frame, with a size, lies between these bytes: a decoder adds up several.
    """
    content.seek(first)
    header = content.read(min(MAX_FRAME_HEADER_BYTES, last - first))
    if len(header) < 6 or not header.startswith(ZSTD_MAGIC):
        raise ValueError("is no zstd frame")
    descriptor = header[4]
    single_segment, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    size_bytes = CONTENT_SIZE_BYTES[descriptor >> 6] or single_segment
    at = 5 + (not single_segment) + DICTIONARY_ID_BYTES[descriptor & 3]
    if not size_bytes or len(header) < at + size_bytes:
        raise ValueError("does not say its size")
    size = int.from_bytes(header[at : at + size_bytes], "little") + (256 if size_bytes == 2 else 0)
    if _end_of_blocks(content, first + at + size_bytes, last) + CHECKSUM_BYTES * checksum != last:
        raise ValueError("is not one zstd frame")
    return size


def _end_of_blocks(content: BinaryIO, at: int, last: int) -> int:
    """One past the last byte of the blocks of a frame, which begin at this byte (RFC 8878, 3.1.1.2)."""
    ended = False
    while not ended and at < last:
        content.seek(at)
        header = int.from_bytes(content.read(BLOCK_HEADER_BYTES), "little")
        ended, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += BLOCK_HEADER_BYTES + (1 if kind == RLE_BLOCK else size)
    if not ended:
        raise ValueError("is a zstd frame without an end")
    return at


def _max_compressed_bytes(size: int) -> int:
    """More than zstd makes of so many bytes that it cannot compress."""
    return size + size // 64 + 1024


def check_files(folder: Path, files: Iterable[TableEntry]) -> None:
    """Raise `Damaged` with the first of these files that is not what the manifest says."""
    for entry in files:
        if fault := entry.fault(folder):
            raise Damaged(f"{folder / entry.file}: {fault} - {repair_hint(folder)}")


def check_layout(
    folder: Path, manifest: Manifest, expected_attributes: Mapping[str, str | int]
) -> dict[str, ChunkLayout]:
    """How each array is packed, after a check of all descriptions, and of files that the manifest does not name.

    Raises `Damaged`, or `Refused` for a table that does not belong to these shards.
    """
    named = {entry.file for entry in manifest.table}
    for path in (folder / TABLE_FOLDER).rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and str(path.relative_to(folder)) not in named:
            raise Damaged(f"{path}: is not in the manifest - {repair_hint(folder)}")
    check_files(folder, (entry for entry in manifest.table if entry.file.endswith("zarr.json")))
    attributes = _group_attributes(folder)
    if any(attributes.get(name) != value for name, value in expected_attributes.items()):
        raise Refused(
            f"{folder / TABLE_FOLDER}: was made from other shards than {folder}/manifest.json names - "
            f"{repair_hint(folder)}"
        )
    dtypes = columns_of(manifest.schema_version) | {
        f"{FEATURE_PREFIX}{block}": FEATURE_TYPE for block in attributes["blocks"]
    }
    files = {f"{TABLE_FOLDER}/zarr.json", *(f"{TABLE_FOLDER}/{name}/zarr.json" for name in dtypes)}
    if odd := files ^ {file for file in named if file.endswith("zarr.json")}:
        raise Damaged(f"{folder / min(odd)}: should {'not ' * (min(odd) in named)}be there - {repair_hint(folder)}")
    rows, max_bytes = sum(shard.draws for shard in manifest.shards), sum(shard.bytes for shard in manifest.shards)
    layouts = {}
    for name, dtype in dtypes.items():
        file = f"{TABLE_FOLDER}/{name}/zarr.json"
        try:
            array = _read_description(folder, file, MAX_ARRAY_JSON_BYTES)
            layouts[name] = _chunk_layout(array, dtype, rows, max_bytes)
        except ValueError as error:
            raise Damaged(f"{folder / file}: {error} - {repair_hint(folder)}") from error
    return layouts


def _read_description(folder: Path, file: str, max_bytes: int) -> dict[str, Any]:
    """The content of a zarr.json."""
    path = checked_path(folder, file)
    try:
        description = json.loads(read_at_most(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not good JSON ({error}) - {repair_hint(folder)}") from error
    if not isinstance(description, dict):
        raise Damaged(f"{path}: describes nothing - {repair_hint(folder)}")
    return description


def _group_attributes(folder: Path) -> dict[str, Any]:
    """The attributes of the group, whose blocks and classes are names."""
    file = f"{TABLE_FOLDER}/zarr.json"
    description = _read_description(folder, file, MAX_GROUP_JSON_BYTES)
    attributes = description.get("attributes")
    group = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    if not isinstance(attributes, dict) or not _is_same_json(description, group):
        raise Damaged(f"{folder / file}: describes no group, or more than one - {repair_hint(folder)}")
    blocks: Any = attributes.get("blocks")
    for name, values in (("blocks", blocks), ("class_names", attributes.get("class_names"))):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise Damaged(f"{folder / file}: its {name} are no names - {repair_hint(folder)}")
    if len({*blocks}) != len(blocks) or len(blocks) > MAX_BLOCKS or not all(map(BLOCK_NAME.fullmatch, blocks)):
        raise Damaged(f"{folder / file}: its blocks are no names - {repair_hint(folder)}")
    return attributes


def _chunk_layout(array: dict[str, Any], dtype: str, rows: int, max_bytes: int) -> ChunkLayout:
    """How an array is packed; raises `ValueError` unless its shape and these arguments give all of its description."""
    try:
        shape = [*map(_size, array["shape"])]
        file_rows = _size(array["chunk_grid"]["configuration"]["chunk_shape"][0])
        chunk_rows = _size(array["codecs"][0]["configuration"]["chunk_shape"][0])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("describes no array of the table") from error
    if not _is_same_json(array, array_description(shape, dtype, file_rows, chunk_rows)):
        raise ValueError("describes its array in another way than is accepted, such as with other codecs")
    width = ITEM_BYTES[dtype] * (shape[1] if len(shape) == 2 else 1)
    if shape[0] != rows or len(shape) != (2 if dtype == FEATURE_TYPE else 1):
        raise ValueError(f"has shape {shape}, the shards have {rows} states")
    if rows * width > max_bytes:
        raise ValueError(f"has {rows * width} bytes, the shards it was made from have {max_bytes}")
    if file_rows % chunk_rows or file_rows > MAX_FILE_ROWS or chunk_rows * width > MAX_CHUNK_BYTES:
        raise ValueError(f"has {file_rows} rows a file, and {chunk_rows} in a chunk of {chunk_rows * width} bytes")
    return ChunkLayout(file_rows // chunk_rows, chunk_rows * width)


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 1 << 48:
        raise ValueError(f"has a size of {value!r:.40}")
    return value


def _is_same_json(a: object, b: object) -> bool:
    """Whether two values are the same JSON; to Python, 3.0 equals 3 and true equals 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def array_description(shape: list[int], dtype: str, file_rows: int, chunk_rows: int) -> dict[str, Any]:
    """The description that zarr writes for such an array (specification of version 3)."""
    little = {"name": "bytes", **({"configuration": {"endian": "little"}} if ITEM_BYTES[dtype] > 1 else {})}
    compressed = [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": [little, *compressed],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [file_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
