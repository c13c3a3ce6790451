"""The record, which a shard stores: one prompt with what the teacher computed for it, and the layout of its tensors.

A safetensors header is accepted only when it is, byte for byte, the one that these tensors have: offsets then follow
from names, types and shapes, and none can overlap, point elsewhere or leave a gap.
"""

import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.values import PictureSize

SCHEMA, LANDINGS_SCHEMA, SCHEMAS = 2, 3, (1, 2, 3)
"""What is written for a new cache, without landings and with them, and all that are read.

Records of schema 1 do not tell the size of their picture.
"""
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
    x_s: Float[Tensor, "K c h w"]
    """float16, rounded before the teacher computed the velocities"""
    v_cond: Float[Tensor, "K c h w"]
    v_uncond: Float[Tensor, "K c h w"]
    trajectory: Bool[Tensor, " K"]
    """True: a state of the guided trajectory; False: x0 under fresh noise"""

    def __len__(self) -> int:
        return len(self.s)


@dataclass(frozen=True)
class BlockFeatures:
    """The spatial mean of each block's last resnet, in the conditional branch."""

    by_block: Mapping[str, Float[Tensor, "K n_b"]]
    """float16, in the order in which the blocks run"""


@dataclass(frozen=True)
class Landings:
    """The values of one guided trajectory at m times: where it starts, and where windows of few-step sampling end.

    The last window ends at s = 0, in the record's x0.
    """

    s: Float[Tensor, " m"]
    """float32, falling from 1; the same in every record of a cache"""
    x: Float[Tensor, "m c h w"]
    """float16; the first is the noise"""

    def __len__(self) -> int:
        return len(self.s)


@dataclass(frozen=True)
class Record:
    """One prompt: its text, its picture, and K states."""

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
    size: PictureSize | None = None
    """of the picture, in pixels; None in schema 1"""
    landings: Landings | None = None
    """None in schemas 1 and 2"""

    @property
    def schema(self) -> int:
        """The schema in which this record is stored."""
        if self.landings is not None:
            return LANDINGS_SCHEMA
        return 1 if self.size is None else 2


PER_PROMPT = {"cond": torch.float16, "x0": torch.float16}
PER_LANDING = {"landing_s": torch.float32, "landing_x": torch.float16}
NOT_PER_STATE = PER_PROMPT | PER_LANDING
"""The tensors that a record has once, whatever the number of its states."""
PER_STATE = {
    "k": torch.int64,
    "s": torch.float32,
    "x_t": torch.float16,
    "v_cond": torch.float16,
    "v_uncond": torch.float16,
    "trajectory": torch.bool,
}
STATE_FIELDS = {name: "x_s" if name == "x_t" else name for name in PER_STATE}
"""The field of `States`, and of a batch, by the stored name: the state at path time s is stored as x_t."""
LATENTS = ("x_t", "v_cond", "v_uncond")
ROW_FIELDS = (*LATENTS, "s", "k")
"""The tensors of a state that a row of a training batch has."""
FEATURES = "features."
SAFETENSORS_TYPES = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
MIN_STATE_BYTES = sum(dtype.itemsize for dtype in PER_STATE.values())
"""The least that one state takes: no record of n bytes has more than n / MIN_STATE_BYTES states."""
MAX_HEADER_BYTES = 1 << 16
"""Some five hundred blocks; SD1.5 has nine and takes 1.5 KB."""
MAX_RECORD_BYTES = 1 << 30
"""A thousand times a record of SD1.5."""
HEADER_LENGTH = struct.Struct("<Q")
"""The number of bytes of the JSON header, at the beginning of every safetensors file."""


def tensors_of(record: Record) -> dict[str, Tensor]:
    """Every tensor of a record by its stored name, in the order of the schema."""
    tensors = {name: getattr(record, name) for name in PER_PROMPT}
    if record.landings is not None:
        tensors |= {"landing_s": record.landings.s, "landing_x": record.landings.x}
    tensors |= {name: getattr(record.states, field) for name, field in STATE_FIELDS.items()}
    return tensors | {f"{FEATURES}{block}": values for block, values in record.features.by_block.items()}


class TensorLayout(NamedTuple):
    """One tensor: its first byte, counted from the beginning of KEY.safetensors, and the shape of one row of it."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int


@dataclass(frozen=True, eq=False)
class RecordLayout:
    """The tensors of one header by name; those of a state have `states` rows, the others one."""

    tensors: Mapping[str, TensorLayout]
    states: int
    bytes: int


@dataclass(frozen=True)
class RecordHeader:
    """A record without its large tensors."""

    key: str
    text: str
    class_name: str
    guidance_scale: float
    blocks: tuple[str, ...]
    k: tuple[int, ...]
    s: tuple[float, ...]
    layout: RecordLayout
    size: PictureSize | None


def is_latent(name: str) -> bool:
    """Whether the last sides of a stored tensor are those of the picture's latents."""
    return name in ("x0", "landing_x", *LATENTS)


def pixels_per_latent(size: PictureSize, latent: Sequence[int]) -> int:
    """How many pixels of a picture a place of its latent [c, h, w] spans; raises `ValueError` unless it is one number.

    That number is 8 for SD1.5, and the same for all records of a cache.
    """
    factor = size.height // latent[1] if len(latent) == 3 else 0
    if factor < 1 or (factor * latent[2], factor * latent[1]) != (size.width, size.height):
        raise ValueError(f"x0 has shape {list(latent)}, which is no latent of a picture of {size}")
    return factor


def header_span(start: bytes | bytearray | memoryview, size: int) -> tuple[int, int]:
    """First and last byte of the JSON in a safetensors file of `size` bytes; raises `ValueError` when it is none."""
    if len(start) < HEADER_LENGTH.size:
        raise ValueError(f"a file of {len(start)} bytes")
    last = HEADER_LENGTH.size + int(HEADER_LENGTH.unpack_from(start)[0])
    if last > min(HEADER_LENGTH.size + MAX_HEADER_BYTES, size):
        raise ValueError(f"a header of {last - HEADER_LENGTH.size} bytes in a file of {size}")
    return HEADER_LENGTH.size, last


@lru_cache(maxsize=256)
def parse_layout(header: bytes, blocks: tuple[str, ...], landings: int = 0) -> RecordLayout:
    """The layout of the header of a record with these blocks and so many landings; raises `ValueError` for another."""
    of_prompt = NOT_PER_STATE if landings else PER_PROMPT
    dtypes = {**of_prompt, **PER_STATE, **{f"{FEATURES}{block}": torch.float16 for block in blocks}}
    shapes = _parse_shapes(header, dtypes)
    states = shapes["k"][0]
    tensors, entries, at, first = dict[str, TensorLayout](), dict[str, Any](), 0, HEADER_LENGTH.size + len(header)
    for name, dtype in sorted(dtypes.items(), key=lambda item: (-item[1].itemsize, item[0])):  # as safetensors sorts
        shape = shapes[name]
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_TYPES[dtype], "shape": shape, "data_offsets": [at, end]}
        if name not in of_prompt:
            if shape[0] != states:
                raise ValueError(f"{name} has {shape[0]} states, k has {states}")
            shape = shape[1:]
        tensors[name] = TensorLayout(first + at, tuple(shape), dtype, math.prod(shape) * dtype.itemsize)
        at = end
    if any(tensors[name].shape != tensors["x0"].shape for name in LATENTS):
        raise ValueError("its states are not of the picture's shape")
    if landings and (shapes["landing_s"], shapes["landing_x"]) != ([landings], [landings, *shapes["x0"]]):
        raise ValueError(f"its landings have shapes {shapes['landing_s']} and {shapes['landing_x']}, not {landings}")
    if any(tensors[name].shape for name in ("k", "s", "trajectory")):
        raise ValueError("it has more than one step, time or kind a state")
    text = json.dumps(entries, separators=(",", ":")).encode()
    if header != text + b" " * (-len(text) % HEADER_LENGTH.size):
        raise ValueError("its header is not the one of these tensors")
    return RecordLayout({name: tensors[name] for name in dtypes}, states, first + at)


def _parse_shapes(header: bytes, names: Collection[str]) -> dict[str, list[int]]:
    """The shape of each tensor, checked before anything is computed of it."""
    try:
        entries = json.loads(header)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(entries, dict) or set(entries) != set(names):
        raise ValueError("it has other tensors than the schema")
    shapes: dict[str, Any] = {
        name: entry.get("shape") if isinstance(entry, dict) else None for name, entry in entries.items()
    }
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4 or not all(map(_is_size, shape)):
            raise ValueError(f"{name} has shape {shape!r:.60}")
    return shapes


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RECORD_BYTES
