"""Where a record's tensors lie inside its shard, so that one draw of it is read without the others."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from shards.codec import FEATURES, PER_DRAW, PER_PROMPT

MOST_HEADER_BYTES = 1 << 20
DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "BOOL": torch.bool}
LENGTH = struct.Struct("<Q")
"""The number of bytes of the JSON header, at the beginning of every safetensors file."""


class Part(NamedTuple):
    """One tensor: its first byte, counted from the beginning of KEY.safetensors, and the shape of one row of it."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int


@dataclass(frozen=True, eq=False)
class Layout:
    """All that one header says: the parts by name; `rows` is how many draws each per-draw part holds."""

    parts: Mapping[str, Part]
    rows: int
    bytes: int


@dataclass(frozen=True)
class Head:
    """What is known of a record without its large tensors."""

    key: str
    text: str
    class_name: str
    guidance_scale: float
    blocks: tuple[str, ...]
    k: tuple[int, ...]
    s: tuple[float, ...]
    layout: Layout


@lru_cache(maxsize=256)
def layout_of(header: bytes, blocks: tuple[str, ...]) -> Layout:
    """What a safetensors header says; raises `ValueError` when it is not one of a record with these blocks."""
    said = json.loads(header)
    if not isinstance(said, dict):
        raise ValueError("its safetensors header is no JSON object")
    wanted = {**PER_PROMPT, **PER_DRAW, **{f"{FEATURES}{block}": torch.float16 for block in blocks}}
    first, rows = LENGTH.size + len(header), 0
    parts, last = {}, first
    for name, dtype in wanted.items():
        shape, begin, end = _entry(name, said.get(name), dtype)
        if name == "k":
            rows = shape[0]
        if name not in PER_PROMPT:
            if shape[0] != rows:
                raise ValueError(f"{name} has {shape[0]} draws, k has {rows}")
            shape = shape[1:]
        parts[name] = Part(first + begin, shape, dtype, math.prod(shape) * dtype.itemsize)
        last = max(last, first + end)
    return Layout(parts, rows, last)


def _entry(name: str, entry: Any, dtype: torch.dtype) -> tuple[tuple[int, ...], int, int]:
    """Shape and place of one tensor, after everything that can be wrong about them."""
    if not isinstance(entry, dict) or DTYPES.get(str(entry.get("dtype"))) != dtype:
        raise ValueError(f"{name} is not there as {dtype}")
    shape, span = _numbers(entry.get("shape")), _numbers(entry.get("data_offsets"))
    if not shape or len(span) != 2:
        raise ValueError(f"{name} has no shape or place")
    begin, end = span
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} takes {end - begin} bytes")
    return shape, begin, end


def _numbers(values: Any) -> tuple[int, ...]:
    """The list as it stands when it holds sizes, else nothing."""
    good = isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 40 for value in values)
    return tuple(values) if good else ()
