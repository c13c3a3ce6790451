"""A safetensors file whose bytes depend on nothing but its content, and which carries the hash of its own tensors.

The library writes metadata in an order that changes from call to call, so the header is written here: eight bytes of
length, JSON with sorted keys padded to a multiple of eight, the tensors in the order of their names.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

TYPES = {torch.float16: "F16", torch.float32: "F32"}
CHUNK = 1 << 24
SEAL = "sollune_header_sha256"


def tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of every tensor, little-endian and in the order of their names."""
    for name in sorted(tensors):
        yield tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over all that follows the header, in ModelSpec's spelling (formats.md 4.1)."""
    sha = hashlib.sha256()
    for part in tensor_bytes(tensors):
        sha.update(part)
    return f"0x{sha.hexdigest()}"


def sealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same with a hash of all it says, so that whoever changes a word of it is noticed."""
    return {**metadata, SEAL: _seal(metadata)}


def is_sealed(metadata: Mapping[str, str]) -> bool:
    """Whether it says what it said when it was sealed, or was written before there were seals."""
    said = {key: value for key, value in metadata.items() if key != SEAL}
    return metadata.get(SEAL, _seal(said)) == _seal(said)


def _seal(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file; raises `KeyError` for a type other than fp16 and fp32, `OSError` as the disk does."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors):
        value = tensors[name]
        start, end = end, end + value.nbytes
        header[name] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor_bytes(tensors))


def hash_in(path: Path) -> str:
    """The same hash as `hash_of`, from the bytes of a written file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    return f"0x{sha.hexdigest()}"
