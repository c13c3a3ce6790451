"""The compressed chunks of the table, judged before zarr unpacks them: none may claim to become larger than it is.

A file of the table ends with an index: for each chunk its first byte and its size, then a checksum. A chunk is a zstd
frame and a checksum. zarr takes the memory that index and frame ask for, before it finds out whether they lie.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

from shards.damage import plainly

ENTRY = struct.Struct("<QQ")
ABSENT = (1 << 64) - 1
"""First byte and size of a chunk that is not there, which holds the fill value."""
CHECKSUM_BYTES = 4
MAGIC = b"\x28\xb5\x2f\xfd"
MOST_FRAME_HEADER_BYTES = 14
DICTIONARY_ID_BYTES, CONTENT_SIZE_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)


class Packing(NamedTuple):
    """How one array lies in its files."""

    chunks: int
    """in each file"""
    chunk_bytes: int
    """of each chunk, unpacked"""


def fault_of_chunks(file: Path, packing: Packing) -> str | None:
    """What is wrong with one file of an array."""
    chunks, chunk_bytes = packing
    index_bytes = chunks * ENTRY.size + CHECKSUM_BYTES
    with open(file, "rb", opener=plainly) as content:
        first_of_index = os.fstat(content.fileno()).st_size - index_bytes
        if first_of_index < 0:
            return f"is too short for an index of {chunks} chunks"
        content.seek(first_of_index)
        for number, (first, size) in enumerate(ENTRY.iter_unpack(content.read(index_bytes - CHECKSUM_BYTES))):
            if (first, size) == (ABSENT, ABSENT):
                continue
            if first + size > first_of_index or size <= CHECKSUM_BYTES:
                return f"chunk {number} lies at bytes {first} to {first + size}, the index begins at {first_of_index}"
            content.seek(first)
            unpacked = unpacked_bytes(content.read(min(MOST_FRAME_HEADER_BYTES, size)))
            if unpacked != chunk_bytes:
                return f"chunk {number} at byte {first} has {unpacked} bytes when unpacked, {chunk_bytes} belong there"
    return None


def unpacked_bytes(frame: bytes) -> int | None:
    """The size that a zstd frame says it has when unpacked (RFC 8878, 3.1.1.1); None when it does not say."""
    if len(frame) < 6 or not frame.startswith(MAGIC):
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    size_bytes = CONTENT_SIZE_BYTES[descriptor >> 6] or single_segment
    first = 5 + (not single_segment) + DICTIONARY_ID_BYTES[descriptor & 3]
    field = frame[first : first + size_bytes]
    if not size_bytes or len(field) < size_bytes:
        return None
    return int.from_bytes(field, "little") + (256 if size_bytes == 2 else 0)
