"""The table beside the shards: one row for each draw, to look things up without reading records.

Rows lie in the order of the shards. Names that repeat (splits, classes) are numbers here and words in the attributes.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.refusal import Refused, did_you_mean, in_one_line
from shards.damage import Damaged
from shards.entries import Part
from shards.manifest import Manifest, find_cache, way_out
from shards.moments import Statistics
from shards.record import SPLITS, Split
from shards.table_chunks import Packing, fault_of_chunks
from shards.table_layout import FEATURE, NAME, check_files, check_layout
from shards.tabulate import ROWS_PER_CHUNK, made_from
from shards.tabulate import is_tabulated as is_tabulated
from shards.tabulate import write_table as write_table

ROWS_AT_ONCE = 4 * ROWS_PER_CHUNK


class Table:
    """The table of a cache, read as it is asked for."""

    def __init__(self, group: zarr.Group, folder: Path, parts: Sequence[Part], packings: Mapping[str, Packing]) -> None:
        self._group, self._folder, self._parts, self._packings = group, folder, parts, packings
        self._checked: set[str] = set()
        said: Mapping[str, Any] = group.attrs.asdict()
        self.blocks: tuple[str, ...] = tuple(said["blocks"])
        self.class_names: tuple[str, ...] = tuple(said["class_names"])

    @classmethod
    def open(cls, folder: Path) -> "Table":
        """The table of a cache or run folder; raises `Refused` when it is missing or was made from other shards."""
        cache = find_cache(folder)
        path, manifest = cache / NAME, Manifest.open(cache)
        if not (path / "zarr.json").is_file():
            raise Refused(f"{path}: not there - {way_out(cache)}")
        if not manifest.table:
            raise Refused(f"{path}: was made from other shards than {cache}/manifest.json names - {way_out(cache)}")
        packings = check_layout(cache, manifest, made_from(manifest))
        return cls(
            zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False), cache, manifest.table, packings
        )

    def __len__(self) -> int:
        return len(self.key)

    @cached_property
    def key(self) -> Int[np.ndarray, " n"]:
        """The record's key, as a number."""
        return self.column("key")

    @cached_property
    def draw(self) -> Int[np.ndarray, " n"]:
        """The row's place among the draws of its record."""
        return self.column("draw")

    @cached_property
    def k(self) -> Int[np.ndarray, " n"]:
        """The teacher's timestep."""
        return self.column("k")

    @cached_property
    def s(self) -> Float[np.ndarray, " n"]:
        """Path time."""
        return self.column("s")

    def rows(
        self, split: Split | None = None, class_name: str | None = None, s_from: float = 0.0, s_to: float = 1.0
    ) -> Int[np.ndarray, " m"]:
        """Numbers of the rows of a split and class with s_from <= s <= s_to, rising."""
        wanted: Bool[np.ndarray, " n"] = (self.s >= s_from) & (self.s <= s_to)
        if split is not None:
            wanted &= self.column("split") == SPLITS.index(split)
        if class_name is not None:
            if class_name not in self.class_names:
                raise Refused(f"class {class_name}: not in the table - {did_you_mean(class_name, self.class_names)}")
            wanted &= self.column("class") == self.class_names.index(class_name)
        return np.flatnonzero(wanted)

    def features(self, block: str, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> Float[Tensor, "m n_b"]:
        """Pooled features of a block at these rows, float16."""
        if block not in self.blocks:
            raise Refused(f"block {block}: not in the table - {did_you_mean(block, self.blocks)}")
        return torch.from_numpy(self.column(f"{FEATURE}{block}", rows))

    def statistics(self, bins: int = 10, split: Split = "train") -> dict[str, Statistics]:
        """Mean and deviation of each channel of each block in each bin of s, in one pass over the table.

        Bin i holds i/bins <= s < (i+1)/bins, and the last one s = 1 too.
        """
        found = {block: Statistics.none(bins, self._width(block)) for block in self.blocks}
        bin_of_row = torch.from_numpy(self.s * np.float32(bins)).floor().long().clamp(0, bins - 1)
        wanted = torch.from_numpy(self.column("split") == SPLITS.index(split))
        for first in range(0, len(self), ROWS_AT_ONCE):
            here = slice(first, first + ROWS_AT_ONCE)
            for block in self.blocks:
                values = self.features(block, here)[wanted[here]]
                found[block] = found[block].joined(Statistics.of(values, bin_of_row[here][wanted[here]], bins))
        return found

    def _width(self, block: str) -> int:
        return self.features(block, slice(0, 0)).shape[1]

    def column(self, name: str, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """A column at these rows; its files are checked against the manifest when it is first asked for."""
        if name not in self._packings:
            raise Refused(f"column {name}: not in the table - {did_you_mean(name, [*self._packings])}")
        if name not in self._checked:
            self._check(name)
        array: Any = self._group[name]
        try:
            return np.asarray(array.oindex[rows])
        except (ValueError, RuntimeError, OSError) as error:  # the codecs' words for bytes of a stranger
            raise Damaged(
                f"{self._folder / NAME / name}: cannot be unpacked ({in_one_line(error)}) - {way_out(self._folder)}"
            ) from error

    def _check(self, name: str) -> None:
        parts = [part for part in self._parts if part.file.startswith(f"{NAME}/{name}/")]
        check_files(self._folder, parts)
        for part in parts:
            path = self._folder / part.file
            fault = None if path.name == "zarr.json" else fault_of_chunks(path, self._packings[name])
            if fault:
                raise Damaged(f"{path}: {fault} - {way_out(self._folder)}")
        self._checked.add(name)
