"""The table beside the shards: one row for each draw, to look things up without reading records.

Rows lie in the order of the shards. Names that repeat (splits, classes) are numbers here and words in the attributes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.refusal import Refused, did_you_mean
from shards.damage import Damaged
from shards.manifest import Manifest, Part, find_cache, way_out
from shards.record import SPLITS, Split
from shards.table_layout import check_files, check_layout
from shards.tabulate import FEATURE, NAME, ROWS_PER_FILE, made_from
from shards.tabulate import write_table as write_table


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of a block, float32."""

    mean: Float[Tensor, " n"]
    std: Float[Tensor, " n"]


class Table:
    """The table of a cache, read as it is asked for."""

    def __init__(self, group: zarr.Group, folder: Path, parts: Sequence[Part]) -> None:
        self._group, self._folder, self._parts = group, folder, parts
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
        check_layout(cache, manifest)
        group = zarr.open_group(path, mode="r")
        said = group.attrs.asdict()
        if any(said.get(name) != value for name, value in made_from(manifest).items()):
            raise Refused(f"{path}: was made from other shards than {cache}/manifest.json names - {way_out(cache)}")
        return cls(group, cache, manifest.table)

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

    def statistics(self, block: str) -> Statistics:
        """Mean and standard deviation of a block's channels over the training rows."""
        count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        train = self.column("split") == SPLITS.index("train")
        for first in range(0, len(self), ROWS_PER_FILE):
            here = slice(first, first + ROWS_PER_FILE)
            values = self.features(block, here)[torch.from_numpy(train[here])].double()
            count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
        mean = total / count
        return Statistics(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float())

    def column(self, name: str, rows: Int[np.ndarray, " m"] | slice = slice(None)) -> np.ndarray:
        """A column at these rows; its files are checked against the manifest when it is first asked for."""
        if name not in self._checked:
            check_files(self._folder, [part for part in self._parts if part.file.startswith(f"{NAME}/{name}/")])
            self._checked.add(name)
        array = self._group[name]
        if not isinstance(array, zarr.Array):
            raise Refused(f"{NAME}/{name}: not an array - remove the table and make it again")
        try:
            return np.asarray(array.oindex[rows])
        except (ValueError, RuntimeError, OSError, MemoryError) as error:  # the codecs' words for bytes of a stranger
            raise Damaged(f"{self._folder / NAME / name}: cannot be decoded ({error})") from error
