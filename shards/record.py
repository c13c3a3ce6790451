"""One prompt with everything the teacher said about it: the unit that a shard stores.

Which tensors a record has, and where they lie inside its KEY.safetensors, so that each is read without the others.

A header is believed only when it is, byte for byte, the one that these tensors have: what lies where then follows from
names, types and shapes, and nothing a stranger writes can overlap, point elsewhere or leave a gap.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SCHEMA = 1
BLOCKS = ("down_0", "down_1", "down_2", "down_3", "mid", "up_0", "up_1", "up_2", "up_3")

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class States:
    """K states of one prompt and the teacher's velocities there.

    On the teacher's guided trajectory, or x_s = (1-s) x0 + s eps of the finished picture under fresh noise.
    """

    k: Int[Tensor, " K"]
    """int64, the teacher's timestep; its last one for the whole tail beyond it"""
    s: Float[Tensor, " K"]
    """float32 path time, 1 is noise; the time of k, except in the tail"""
    x_t: Float[Tensor, "K c h w"]
    """float16, rounded before the teacher was asked"""
    v_cond: Float[Tensor, "K c h w"]
    v_uncond: Float[Tensor, "K c h w"]
    trajectory: Bool[Tensor, " K"]
    """True: a state of the guided trajectory; False: x0 noised again"""

    def __len__(self) -> int:
        return len(self.s)


@dataclass(frozen=True)
class BlockFeatures:
    """The spatial mean of each block's last resnet, in the conditional branch."""

    by_block: Mapping[str, Float[Tensor, "K n_b"]]
    """float16, in the order in which the blocks run"""


@dataclass(frozen=True)
class Record:
    """One prompt: its sentence, its picture, and K draws."""

    key: str
    """the prompt's index in its split, nine digits"""
    text: str
    class_name: str
    seed: int
    guidance_scale: float
    cond: Float[Tensor, "L d"]
    x0: Float[Tensor, "c h w"]
    states: States
    features: BlockFeatures


PER_PROMPT = {"cond": torch.float16, "x0": torch.float16}
PER_STATE = {
    "k": torch.int64,
    "s": torch.float32,
    "x_t": torch.float16,
    "v_cond": torch.float16,
    "v_uncond": torch.float16,
    "trajectory": torch.bool,
}
FEATURES = "features."
LATENTS = ("x_t", "v_cond", "v_uncond")
SAFETENSORS_TYPES = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
MIN_STATE_BYTES = sum(dtype.itemsize for dtype in PER_STATE.values())
"""What one draw takes at least: no record of n bytes has more than n / LEAST_DRAW_BYTES draws."""
MAX_HEADER_BYTES = 1 << 16
"""Some five hundred blocks; SD1.5 has nine and takes 1.5 KB."""
MAX_RECORD_BYTES = 1 << 30
"""A thousand times a record of SD1.5."""
HEADER_LENGTH = struct.Struct("<Q")
"""The number of bytes of the JSON header, at the beginning of every safetensors file."""


class TensorLayout(NamedTuple):
    """One tensor: its first byte, counted from the beginning of KEY.safetensors, and the shape of one row of it."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int


@dataclass(frozen=True, eq=False)
class RecordLayout:
    """All that one header says: the parts by name; `rows` is how many draws each per-draw part holds."""

    tensors: Mapping[str, TensorLayout]
    states: int
    bytes: int

    def rows_of(self, name: str) -> int:
        """How many rows of `Part.shape` a part has: one of what belongs to the prompt."""
        return 1 if name in PER_PROMPT else self.states

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each part: the same in every record of a cache."""
        return {name: part.shape for name, part in self.tensors.items()}


@dataclass(frozen=True)
class RecordHeader:
    """What is known of a record without its large tensors."""

    key: str
    text: str
    class_name: str
    guidance_scale: float
    blocks: tuple[str, ...]
    k: tuple[int, ...]
    s: tuple[float, ...]
    layout: RecordLayout


def header_span(start: bytes | bytearray | memoryview, size: int) -> tuple[int, int]:
    """First and last byte of the JSON in a safetensors file of `size` bytes; raises `ValueError` when it is none."""
    if len(start) < HEADER_LENGTH.size:
        raise ValueError(f"a file of {len(start)} bytes")
    last = HEADER_LENGTH.size + int(HEADER_LENGTH.unpack_from(start)[0])
    if last > min(HEADER_LENGTH.size + MAX_HEADER_BYTES, size):
        raise ValueError(f"a header of {last - HEADER_LENGTH.size} bytes in a file of {size}")
    return HEADER_LENGTH.size, last


@lru_cache(maxsize=256)
def parse_layout(header: bytes, blocks: tuple[str, ...]) -> RecordLayout:
    """What a safetensors header says; raises `ValueError` when it is not the one of a record with these blocks."""
    wanted = {**PER_PROMPT, **PER_STATE, **{f"{FEATURES}{block}": torch.float16 for block in blocks}}
    shapes = _parse_shapes(header, wanted)
    rows = shapes["k"][0]
    parts, said, at, first = dict[str, TensorLayout](), dict[str, Any](), 0, HEADER_LENGTH.size + len(header)
    for name, dtype in sorted(wanted.items(), key=lambda one: (-one[1].itemsize, one[0])):  # as safetensors sorts them
        shape = shapes[name]
        end = at + math.prod(shape) * dtype.itemsize
        said[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": shape, "data_offsets": [at, end]}
        if name not in PER_PROMPT:
            if shape[0] != rows:
                raise ValueError(f"{name} has {shape[0]} draws, k has {rows}")
            shape = shape[1:]
        parts[name] = TensorLayout(first + at, tuple(shape), dtype, math.prod(shape) * dtype.itemsize)
        at = end
    if any(parts[name].shape != parts["x0"].shape for name in LATENTS):
        raise ValueError("its states are not of the picture's shape")
    if any(parts[name].shape for name in ("k", "s", "trajectory")):
        raise ValueError("it has more than one step, time or kind a draw")
    text = json.dumps(said, separators=(",", ":")).encode()
    if header != text + b" " * (-len(text) % HEADER_LENGTH.size):
        raise ValueError("its header is not the one of these tensors")
    return RecordLayout({name: parts[name] for name in wanted}, rows, first + at)


def _parse_shapes(header: bytes, wanted: Mapping[str, torch.dtype]) -> dict[str, list[int]]:
    """The shape of each tensor, judged before anything is computed of it."""
    try:
        said = json.loads(header)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(said, dict) or set(said) != set(wanted):
        raise ValueError("it has other tensors than the schema")
    found = {}
    for name, entry in said.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or any(not _is_size(size) for size in shape):
            raise ValueError(f"{name} has shape {shape!r:.60}")
        found[name] = shape
    return found


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RECORD_BYTES
