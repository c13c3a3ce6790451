"""The table's own description of itself, judged before zarr believes it.

An array is described in exactly one way: a stranger cannot ask for another codec, a shape beyond the shards, a fill
value, or a description inside another one that zarr would believe instead.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.refusal import Refused
from shards.codec import BLOCK, MOST_BLOCKS
from shards.damage import Damaged, inside, read_bounded, way_out
from shards.entries import Part
from shards.manifest import Manifest
from shards.table_chunks import Packing

NAME = "table.zarr"
COLUMNS = {"key": "int64", "split": "int8", "draw": "int16", "k": "int64", "s": "float32", "class": "int32"}
FEATURE, FEATURE_TYPE = "feature_", "float16"
ITEM_BYTES = {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "float32": 4, "float16": 2}
MOST_ARRAY_JSON_BYTES, MOST_GROUP_JSON_BYTES = 1 << 13, 1 << 24
MOST_FILE_ROWS, MOST_CHUNK_BYTES = 1 << 16, 1 << 26
"""Of SD1.5's widest block a chunk has 2.6 MB."""


def check_files(folder: Path, parts: Iterable[Part]) -> None:
    """Raise `Damaged` with the first of these files that is not what the manifest says."""
    for part in parts:
        fault = part.fault(folder)
        if fault:
            raise Damaged(f"{folder / part.file}: {fault} - {way_out(folder)}")


def check_layout(folder: Path, manifest: Manifest, belongs_to: Mapping[str, str | int]) -> dict[str, Packing]:
    """How each array is packed, after a look at all descriptions and for files that the manifest does not name.

    Raises `Damaged`, or `Refused` for a table that does not belong to these shards.
    """
    named = {part.file for part in manifest.table}
    for path in (folder / NAME).rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and str(path.relative_to(folder)) not in named:
            raise Damaged(f"{path}: is not in the manifest - {way_out(folder)}")
    check_files(folder, (part for part in manifest.table if part.file.endswith("zarr.json")))
    said = _described(folder, f"{NAME}/zarr.json", MOST_GROUP_JSON_BYTES)
    attributes = _attributes(folder, said)
    if any(attributes.get(name) != value for name, value in belongs_to.items()):
        raise Refused(
            f"{folder / NAME}: was made from other shards than {folder}/manifest.json names - {way_out(folder)}"
        )
    kinds = COLUMNS | {f"{FEATURE}{block}": FEATURE_TYPE for block in attributes["blocks"]}
    files = {f"{NAME}/zarr.json", *(f"{NAME}/{name}/zarr.json" for name in kinds)}
    if odd := files ^ {file for file in named if file.endswith("zarr.json")}:
        raise Damaged(f"{folder / min(odd)}: should {'not ' * (min(odd) in named)}be there - {way_out(folder)}")
    rows, most_bytes = sum(shard.draws for shard in manifest.shards), sum(shard.bytes for shard in manifest.shards)
    found = {}
    for name, kind in kinds.items():
        file = f"{NAME}/{name}/zarr.json"
        try:
            found[name] = _packing(_described(folder, file, MOST_ARRAY_JSON_BYTES), kind, rows, most_bytes)
        except ValueError as error:
            raise Damaged(f"{folder / file}: {error} - {way_out(folder)}") from error
    return found


def _described(folder: Path, file: str, most: int) -> dict[str, Any]:
    """What a zarr.json says."""
    path = inside(folder, file)
    try:
        said = json.loads(read_bounded(path, most))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: not good JSON ({error}) - {way_out(folder)}") from error
    if not isinstance(said, dict):
        raise Damaged(f"{path}: describes nothing - {way_out(folder)}")
    return said


def _attributes(folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the group, whose blocks and classes are names."""
    attributes = said.get("attributes")
    if not isinstance(attributes, dict) or not _alike(said, group_description(attributes)):
        raise Damaged(f"{folder / NAME}/zarr.json: describes no group, or more than one - {way_out(folder)}")
    for name in ("blocks", "class_names"):
        words = attributes.get(name)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise Damaged(f"{folder / NAME}/zarr.json: its {name} are no names - {way_out(folder)}")
    blocks = attributes["blocks"]
    if len({*blocks}) != len(blocks) or len(blocks) > MOST_BLOCKS or not all(map(BLOCK.fullmatch, blocks)):
        raise Damaged(f"{folder / NAME}/zarr.json: its blocks are no names - {way_out(folder)}")
    return attributes


def _packing(said: dict[str, Any], kind: str, rows: int, most_bytes: int) -> Packing:
    """How an array is packed; raises `ValueError` unless all of its description follows from its shape and this."""
    try:
        shape = [*map(_size, said["shape"])]
        file_rows = _size(said["chunk_grid"]["configuration"]["chunk_shape"][0])
        chunk_rows = _size(said["codecs"][0]["configuration"]["chunk_shape"][0])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("describes no array of the table") from error
    if not _alike(said, description(shape, kind, file_rows, chunk_rows)):
        raise ValueError("describes its array in another way than is believed, such as with other codecs")
    width = ITEM_BYTES[kind] * (shape[1] if len(shape) == 2 else 1)
    if shape[0] != rows or len(shape) != (2 if kind == FEATURE_TYPE else 1):
        raise ValueError(f"has shape {shape}, the shards have {rows} draws")
    if rows * width > most_bytes:
        raise ValueError(f"has {rows * width} bytes, the shards it was made from have {most_bytes}")
    if file_rows % chunk_rows or file_rows > MOST_FILE_ROWS or chunk_rows * width > MOST_CHUNK_BYTES:
        raise ValueError(f"has {file_rows} rows a file, and {chunk_rows} in a chunk of {chunk_rows * width} bytes")
    return Packing(file_rows // chunk_rows, chunk_rows * width)


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 1 << 48:
        raise ValueError(f"has a size of {value!r:.40}")
    return value


def _alike(a: object, b: object) -> bool:
    """Whether two things are the same JSON: for Python alone, 3.0 is 3 and true is 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def group_description(attributes: dict[str, Any]) -> dict[str, Any]:
    """What zarr writes of a group."""
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def description(shape: list[int], kind: str, file_rows: int, chunk_rows: int) -> dict[str, Any]:
    """What zarr writes of such an array, by its specification of version 3."""
    little = {"name": "bytes", **({"configuration": {"endian": "little"}} if ITEM_BYTES[kind] > 1 else {})}
    compressed = [{"name": "zstd", "configuration": {"level": 3, "checksum": False}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": [little, *compressed],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": shape,
        "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [file_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if kind.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
