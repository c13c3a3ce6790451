"""The table of a cache: one row for each state, in the order of the shards, to look things up without reading records.

Names that repeat (splits, classes) are numbers in the columns and texts in the attributes.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Float, Int
from torch import Tensor
from zarr.codecs import Crc32cCodec, ZstdCodec

from shards.archive import Shard, TableEntry, sha256_of
from shards.integrity import Damaged, repair_hint
from shards.manifest import Manifest, find_cache
from shards.reader import Reader
from shards.record import SPLITS, Record, Split
from shards.stats import Statistics
from shards.table_check import (
    FEATURE_PREFIX,
    FEATURE_TYPE,
    TABLE_FOLDER,
    ChunkLayout,
    check_files,
    check_layout,
    chunk_fault,
    columns_of,
)
from stages.system.atomic import fsync_folder, temporary_path
from stages.system.disk import refuse_write_errors
from stages.system.refusal import Refused, did_you_mean, in_one_line

ROWS_PER_CHUNK, ROWS_PER_FILE = 1024, 16384
ROWS_AT_ONCE = 4 * ROWS_PER_CHUNK
UNITS = {"s": "path time, 1 is noise", "k": "teacher's timestep", "feature": "spatial mean of activations"}
SIZE_UNITS = {"width": "pixels of the picture", "height": "pixels of the picture"}
Columns = dict[str, np.ndarray]


def write_table(folder: Path) -> None:
    """Make the table of a finished cache, all or nothing; the same shards always give the same bytes."""
    target = folder / TABLE_FOLDER
    temporary = temporary_path(target)
    replaced = temporary_path(target.with_name(f"old.{TABLE_FOLDER}"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with refuse_write_errors(target):
            _write_arrays(temporary, folder)
            _make_durable(temporary)
            if os.path.lexists(target):  # its name goes at once, its files one by one
                target.rename(replaced)
            temporary.rename(target)
            fsync_folder(folder)
            Manifest.open(folder).model_copy(update={"table": table_files(folder)}).save(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def is_tabulated(folder: Path) -> bool:
    """Whether the table of these shards is there, byte for byte."""
    table = Manifest.open(folder).table
    return bool(table) and table == table_files(folder)


def table_files(folder: Path) -> tuple[TableEntry, ...]:
    """Every file of the table, as the manifest names it."""
    files = sorted(str(path.relative_to(folder)) for path in (folder / TABLE_FOLDER).rglob("*") if not path.is_dir())
    return tuple(
        TableEntry(file=file, bytes=(folder / file).stat().st_size, sha256=sha256_of(folder / file)) for file in files
    )


def source_attributes(manifest: Manifest) -> dict[str, str | int]:
    """The attributes by which a table names its recipe, and its shards with their content."""
    shards = "".join(f"{shard.file} {shard.sha256}\n" for shard in manifest.shards)
    sha256 = hashlib.sha256(shards.encode()).hexdigest()
    return {
        "schema_version": manifest.schema_version,
        "recipe_sha256": manifest.recipe.fingerprint(),
        "shards_sha256": sha256,
    }


def _write_arrays(path: Path, folder: Path) -> None:
    reader = Reader(folder)
    classes = sorted({name for split in SPLITS for name in reader.class_names(split)})
    rows = sum(shard.draws for shard in reader.manifest.shards)
    widths = {block: values.shape[1] for block, values in next(reader.records()).features.by_block.items()}
    group = zarr.open_group(path, mode="w-", zarr_format=3)
    group.attrs.update(source_attributes(reader.manifest))
    group.attrs.update({"blocks": [*widths], "class_names": classes, "splits": [*SPLITS]})
    group.attrs["units"] = UNITS | (SIZE_UNITS if reader.manifest.schema_version > 1 else {})
    columns: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (dtype, ()) for name, dtype in columns_of(reader.manifest.schema_version).items()
    }
    columns |= {f"{FEATURE_PREFIX}{block}": (FEATURE_TYPE, (width,)) for block, width in widths.items()}
    arrays: dict[str, zarr.Array[Any]] = {
        name: group.create_array(
            name,
            shape=(rows, *width),
            dtype=dtype,
            chunks=(ROWS_PER_CHUNK, *width),
            shards=(ROWS_PER_FILE, *width),
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
        )
        for name, (dtype, width) in columns.items()
    }
    first = 0
    for block in _row_blocks(reader, classes):
        last = first + len(block["key"])
        for name, values in block.items():
            arrays[name][first:last] = values
        first = last


def _row_blocks(reader: Reader, classes: list[str]) -> Iterator[Columns]:
    """The rows of all records, exactly ROWS_PER_FILE at a time, so that every file of the table is written once."""
    waiting: list[Columns] = []
    count = 0
    for split in SPLITS:
        for record in reader.records(split):
            waiting.append(table_rows(record, split, classes.index(record.class_name)))
            count += len(record.states)
            if count >= ROWS_PER_FILE:
                joined = _concatenate(waiting)
                yield {name: values[:ROWS_PER_FILE] for name, values in joined.items()}
                waiting = [{name: values[ROWS_PER_FILE:] for name, values in joined.items()}]
                count -= ROWS_PER_FILE
    if count:
        yield _concatenate(waiting)


def _concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def table_rows(record: Record, split: Split, class_number: int) -> Columns:
    """The rows of one record, column by column."""
    states = record.states
    constant = {"key": int(record.key), "split": SPLITS.index(split), "class": class_number}
    if record.size is not None:
        constant |= {"width": record.size.width, "height": record.size.height}
    dtypes = columns_of(record.schema)
    columns = {name: np.full(len(states), value, dtype=dtypes[name]) for name, value in constant.items()}
    columns |= {"draw": np.arange(len(states), dtype=dtypes["draw"]), "k": states.k.numpy(), "s": states.s.numpy()}
    return columns | {f"{FEATURE_PREFIX}{block}": values.numpy() for block, values in record.features.by_block.items()}


def _make_durable(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            fsync_folder(file)
        else:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


class Table:
    """The table of a cache; a column is read, and its files checked, when it is first needed."""

    def __init__(
        self, group: zarr.Group, folder: Path, files: Sequence[TableEntry], chunk_layouts: Mapping[str, ChunkLayout]
    ) -> None:
        self._group, self._folder, self._files, self._chunk_layouts = group, folder, files, chunk_layouts
        self._verified_columns: set[str] = set()
        attributes: Mapping[str, Any] = group.attrs.asdict()
        self.blocks: tuple[str, ...] = tuple(attributes["blocks"])
        self.class_names: tuple[str, ...] = tuple(attributes["class_names"])

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """The table of a cache or run folder; raises `Refused` when it is missing or was made from other shards."""
        cache = find_cache(folder)
        path, manifest = cache / TABLE_FOLDER, Manifest.open(cache)
        if not (path / "zarr.json").is_file():
            raise Refused(f"{path}: not there - {repair_hint(cache)}")
        if not manifest.table:
            raise Refused(f"{path}: was made from other shards than {cache}/manifest.json names - {repair_hint(cache)}")
        chunk_layouts = check_layout(cache, manifest, source_attributes(manifest))
        group = zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
        return cls(group, cache, manifest.table, chunk_layouts)

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def key(self) -> Int[np.ndarray, " n"]:
        """The record's key, as a number."""
        return self.column("key")

    @cached_property
    def state_index(self) -> Int[np.ndarray, " n"]:
        """The row's place among the states of its record."""
        return self.column("draw")

    @cached_property
    def k(self) -> Int[np.ndarray, " n"]:
        """The teacher's timestep."""
        return self.column("k")

    @cached_property
    def s(self) -> Float[np.ndarray, " n"]:
        """Path time."""
        return self.column("s")

    def rows(self, split: Split) -> Int[np.ndarray, " m"]:
        """Numbers of the rows of a split, rising."""
        return np.flatnonzero(self.column("split") == SPLITS.index(split))

    def features(self, block: str, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> Float[Tensor, "m n_b"]:
        """Pooled features of a block at these rows, float16."""
        if block not in self.blocks:
            raise Refused(f"block {block}: not in the table - {did_you_mean(block, self.blocks)}")
        return torch.from_numpy(self.column(f"{FEATURE_PREFIX}{block}", rows))

    def statistics(self, bins: int = 10) -> dict[str, Statistics]:
        """Statistics of each block in each bin of s over the training split, in one pass over the table.

        Bin i holds i/bins <= s < (i+1)/bins, and the last one s = 1 too.
        """
        statistics = {
            block: Statistics.empty(bins, self.features(block, slice(0, 0)).shape[1]) for block in self.blocks
        }
        bin_of_row = torch.from_numpy(self.s * np.float32(bins)).floor().long().clamp(0, bins - 1)
        in_split = torch.from_numpy(self.column("split") == SPLITS.index("train"))
        for first in range(0, len(self), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            mask = in_split[part]
            for block, before in statistics.items():
                values = self.features(block, part)[mask]
                statistics[block] = before.merge(Statistics.from_values(values, bin_of_row[part][mask], bins))
        return statistics

    def column(self, name: str, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """A column at these rows; its files are checked against the manifest first."""
        if name not in self._chunk_layouts:
            raise Refused(f"column {name}: not in the table - {did_you_mean(name, [*self._chunk_layouts])}")
        if name not in self._verified_columns:
            self._check(name)
        array: Any = self._group[name]
        try:
            return np.asarray(array.oindex[rows])
        except (ValueError, RuntimeError, OSError) as error:  # what the codecs raise for damaged bytes
            path = self._folder / TABLE_FOLDER / name
            raise Damaged(f"{path}: cannot be unpacked ({in_one_line(error)}) - {repair_hint(self._folder)}") from error

    def _check(self, name: str) -> None:
        entries = [entry for entry in self._files if entry.file.startswith(f"{TABLE_FOLDER}/{name}/")]
        check_files(self._folder, entries)
        for entry in entries:
            path = self._folder / entry.file
            fault = None if path.name == "zarr.json" else chunk_fault(path, self._chunk_layouts[name])
            if fault:
                raise Damaged(f"{path}: {fault} - {repair_hint(self._folder)}")
        self._verified_columns.add(name)


class ShardTableRows:
    """The rows of the table that belong to one shard; each column is read once, when it is first needed."""

    def __init__(self, table: Table, first: int, shard: Shard) -> None:
        self.table, self._split = table, shard.split
        self._column = cache(lambda name: table.column(name, slice(first, first + shard.draws)))

    def mismatch(self, record: Record, number: int) -> str | None:
        """How the rows of record `number` of the shard differ from it."""
        blocks = tuple(record.features.by_block)
        if record.class_name not in self.table.class_names:
            return f"class {record.class_name} is not in the table"
        if blocks != self.table.blocks:
            return f"has blocks {', '.join(blocks)}, the table has {', '.join(self.table.blocks)}"
        rows = slice(number * len(record.states), (number + 1) * len(record.states))
        expected = table_rows(record, self._split, self.table.class_names.index(record.class_name))
        for name, values in expected.items():
            try:
                stored = self._column(name)[rows]
            except (Refused, KeyError) as error:
                return f"the table has no {name}: {error}"
            if stored.dtype != values.dtype or not np.array_equal(stored, values):
                return f"the table has another {name}"
        return None
