"""Makes the table of a cache: one row for each draw, in the order of the shards, all or nothing."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from configs.atomic import fsync_folder, unfinished
from configs.disk import writing
from shards.archive import sha256_of
from shards.entries import Part
from shards.manifest import Manifest
from shards.reader import Reader
from shards.record import SCHEMA, SPLITS, Record, Split
from shards.table_layout import COLUMNS, FEATURE, FEATURE_TYPE
from shards.table_layout import NAME as NAME

ROWS_PER_CHUNK, ROWS_PER_FILE = 1024, 16384


def write_table(folder: Path) -> None:
    """Make the table of a finished cache, all or nothing; the same shards always give the same bytes."""
    target = folder / NAME
    temporary = unfinished(target)
    replaced = unfinished(target.with_name(f"old.{NAME}"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(target):
            _fill(temporary, folder)
            _make_durable(temporary)
            if os.path.lexists(target):  # its name goes at once, its files one by one
                target.rename(replaced)
            temporary.rename(target)
            fsync_folder(folder)
            Manifest.open(folder).model_copy(update={"table": parts_of(folder)}).save(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def is_tabulated(folder: Path) -> bool:
    """Whether the table of these very shards is there, byte for byte."""
    table = Manifest.open(folder).table
    return bool(table) and table == parts_of(folder)


def parts_of(folder: Path) -> tuple[Part, ...]:
    """Every file of the table, as the manifest names it."""
    files = sorted(str(path.relative_to(folder)) for path in (folder / NAME).rglob("*") if not path.is_dir())
    return tuple(
        Part(file=file, bytes=(folder / file).stat().st_size, sha256=sha256_of(folder / file)) for file in files
    )


def made_from(manifest: Manifest) -> dict[str, str | int]:
    """What a table belongs to: a recipe, and these shards with this content."""
    listed = "".join(f"{shard.file} {shard.sha256}\n" for shard in manifest.shards)
    shards = hashlib.sha256(listed.encode()).hexdigest()
    return {"schema_version": SCHEMA, "recipe_sha256": manifest.recipe.fingerprint(), "shards_sha256": shards}


def _fill(path: Path, folder: Path) -> None:
    reader = Reader(folder)
    classes = sorted({name for split in SPLITS for name in reader.class_names(split)})
    rows = sum(shard.draws for shard in reader.manifest.shards)
    widths = {block: values.shape[1] for block, values in next(reader.records()).features.by_block.items()}
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.attrs.update(
        {
            **made_from(reader.manifest),
            "blocks": list(widths),
            "class_names": classes,
            "splits": list(SPLITS),
            "units": {
                "s": "path time, 1 is noise",
                "k": "teacher's timestep",
                "feature": "spatial mean of activations",
            },
        }
    )
    shapes: dict[str, tuple[tuple[int, ...], str]] = {name: ((rows,), kind) for name, kind in COLUMNS.items()}
    shapes |= {f"{FEATURE}{block}": ((rows, width), FEATURE_TYPE) for block, width in widths.items()}
    arrays = {name: _array(group, name, shape, kind) for name, (shape, kind) in shapes.items()}
    first = 0
    for block in _blocks(reader, classes):
        last = first + len(block["key"])
        for name, values in block.items():
            arrays[name][first:last] = values
        first = last


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(ROWS_PER_CHUNK, *shape[1:]),
        shards=(ROWS_PER_FILE, *shape[1:]),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
    )


def _blocks(reader: Reader, classes: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of all records, exactly ROWS_PER_FILE at a time, so that every file of the table is written once."""
    waiting: list[dict[str, np.ndarray]] = []
    count = 0
    for split in SPLITS:
        for record in reader.records(split):
            waiting.append(rows_of(record, split, classes.index(record.class_name)))
            count += len(record.draws)
            if count >= ROWS_PER_FILE:
                joined = _joined(waiting)
                yield {name: values[:ROWS_PER_FILE] for name, values in joined.items()}
                waiting = [{name: values[ROWS_PER_FILE:] for name, values in joined.items()}]
                count -= ROWS_PER_FILE
    if count:
        yield _joined(waiting)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rows_of(record: Record, split: Split, class_number: int) -> dict[str, np.ndarray]:
    """The rows of one record, column by column."""
    draws = record.draws
    alike = {"key": int(record.key), "split": SPLITS.index(split), "class": class_number}
    columns = {name: np.full(len(draws), value, dtype=COLUMNS[name]) for name, value in alike.items()}
    columns |= {"draw": np.arange(len(draws), dtype=COLUMNS["draw"]), "k": draws.k.numpy(), "s": draws.s.numpy()}
    return columns | {f"{FEATURE}{block}": values.numpy() for block, values in record.features.by_block.items()}


def _make_durable(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            fsync_folder(file)
        else:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
