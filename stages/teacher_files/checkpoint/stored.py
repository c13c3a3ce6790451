"""Tensors that lie in a file and are read one at a time, and a .safetensors file that is written likewise."""

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.system.refusal import Refused, in_one_line
from stages.system.text import plain_file_bytes

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The types of safetensors, by their names there; a file with others is refused."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 8


class LazyTensor(Protocol):
    """A tensor whose type and shape are known, and whose values are read or computed when they are needed."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def file(self) -> Path:
        """Where its values come from."""

    def read(self) -> Tensor:
        """Its values, contiguous, on the CPU."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its values lie."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """in elements"""
    offset: int
    """of its first element, in bytes from the beginning of the file"""

    def read(self) -> Tensor:
        """Its values, contiguous, on the CPU; raises `Refused` where the file has become shorter."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        elements = 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        content = bytearray(elements * self.dtype.itemsize)
        # Read, not mapped: pages of a mapped file count as this process's memory for as long as it is open.
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(content), 0
            while done < len(content):
                count = file.readinto(view[done:])
                if not count:
                    raise Refused(f"{self.file}: has become shorter while it was read - open it again")
                done += count
        return torch.frombuffer(content, dtype=self.dtype).as_strided(self.shape, self.stride).contiguous()

    def mapped(self) -> Tensor:
        """The same, mapped from the disk where it can be: pages come in as they are used."""
        if 0 in self.shape:
            return self.read()
        with open(self.file, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        elements = (len(content) - self.offset) // self.dtype.itemsize
        whole = torch.frombuffer(content, dtype=self.dtype, count=elements, offset=self.offset)
        return whole.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor that is computed of another when it is needed; the function keeps its type."""

    source: LazyTensor
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The type of its source."""
        return self.source.dtype

    @property
    def file(self) -> Path:
        """The file of its source."""
        return self.source.file

    def read(self) -> Tensor:
        """Its values."""
        return self.change(self.source.read()).contiguous()


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The steps, in elements, of a tensor whose values lie one after the other."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file by name, and what else it says."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    foreign: tuple[str, ...] = ()
    """Names of foreign classes and functions in a pickle; none of them was imported or called."""


def read_safetensors(path: Path, subject: str, remedy: str) -> TensorFile:
    """The tensors of a .safetensors file, of which the header alone is read.

    Raises `Refused`, beginning with `subject`, for a broken file and for a type of tensor that torch does not know.
    """
    size = plain_file_bytes(path, subject, remedy)
    try:
        with safe_open(path, "pt"):  # checks offsets, sizes and names
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{subject} is not a whole safetensors file ({in_one_line(error)}) - {remedy}") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise Refused(f"{subject}: tensor {name} is of type {entry['dtype']}, which is not read - {remedy}")
        shape, begin = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, DTYPES[entry["dtype"]], shape, contiguous_stride(shape), begin)
    assert all(stored.offset <= size for stored in tensors.values())
    return TensorFile(path, tensors, metadata)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like a .safetensors file, whatever its name."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def safetensors_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    """About how many bytes a file of these tensors has."""
    return sum(64 + len(name) + _value_bytes(value) for name, value in tensors.items())


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a file of these tensors, each read when it is its turn; names in order, so that the bytes are fixed.

    Raises `Refused` for values that are not finite, with the file that they come from.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wider types first, as the library orders them, so that every tensor lies at a multiple of its type's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        begin, end = end, end + _value_bytes(tensors[name])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(_values(tensors, names))


def _values(tensors: Mapping[str, LazyTensor], names: list[str]) -> Iterator[memoryview]:
    for name in names:
        value = tensors[name].read()
        assert (value.dtype, tuple(value.shape)) == (tensors[name].dtype, tuple(tensors[name].shape)), name
        _refuse_non_finite(tensors[name].file, name, value)
        yield value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _refuse_non_finite(file: Path, name: str, value: Tensor) -> None:
    if value.is_floating_point() and (count := int((~value.float().isfinite()).sum())):
        raise Refused(
            f"teacher: {file}: tensor {name} is not finite in {count} of {value.numel()} values - fetch the file again"
        )


def _value_bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
