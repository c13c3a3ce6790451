"""The compressed chunks of the table, judged before zarr unpacks them: none may claim to become larger than it is.

A file of the table ends with an index: for each chunk its first byte and its size, then a checksum. A chunk is a zstd
frame and a checksum. zarr takes the memory that index and frame ask for, before it finds out whether they lie.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.damage import plainly

ENTRY = struct.Struct("<QQ")
ABSENT = (1 << 64) - 1
"""First byte and size of a chunk that is not there, which holds the fill value."""
CHECKSUM_BYTES = 4
MAGIC = b"\x28\xb5\x2f\xfd"
MOST_FRAME_HEADER_BYTES = 18
DICTIONARY_ID_BYTES, CONTENT_SIZE_BYTES = (0, 1, 2, 4), (0, 2, 4, 8)
BLOCK_HEADER_BYTES, RUN = 3, 1


class Packing(NamedTuple):
    """How one array lies in its files."""

    chunks: int
    """in each file"""
    chunk_bytes: int
    """of each chunk, unpacked"""


def fault_of_chunks(file: Path, packing: Packing) -> str | None:
    """What is wrong with one file of an array."""
    index_bytes = packing.chunks * ENTRY.size + CHECKSUM_BYTES
    with open(file, "rb", opener=plainly) as content:
        end = os.fstat(content.fileno()).st_size - index_bytes
        if end < 0:
            return f"is too short for an index of {packing.chunks} chunks"
        content.seek(end)
        for number, (first, size) in enumerate(ENTRY.iter_unpack(content.read(index_bytes - CHECKSUM_BYTES))):
            if (first, size) == (ABSENT, ABSENT):
                continue
            if first + size > end or not CHECKSUM_BYTES < size <= _most_packed(packing.chunk_bytes):
                return f"chunk {number} lies at bytes {first} to {first + size}, the index begins at {end}"
            try:
                unpacked = unpacked_bytes(content, first, first + size - CHECKSUM_BYTES)
            except ValueError as error:
                return f"chunk {number} at byte {first}: {error}"
            if unpacked != packing.chunk_bytes:
                return f"chunk {number} at byte {first} says {unpacked} bytes unpacked, not {packing.chunk_bytes}"
    return None


def unpacked_bytes(content: BinaryIO, first: int, last: int) -> int:
    """The size that a zstd frame says it has when unpacked (RFC 8878, 3.1.1).

    Raises `ValueError` unless exactly one frame, which says its size, lies between these bytes: of several, all that
    they claim would be believed.
    """
    content.seek(first)
    header = content.read(min(MOST_FRAME_HEADER_BYTES, last - first))
    if len(header) < 6 or not header.startswith(MAGIC):
        raise ValueError("is no zstd frame")
    descriptor = header[4]
    single_segment, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    size_bytes = CONTENT_SIZE_BYTES[descriptor >> 6] or single_segment
    at = 5 + (not single_segment) + DICTIONARY_ID_BYTES[descriptor & 3]
    if not size_bytes or len(header) < at + size_bytes:
        raise ValueError("does not say its size")
    size = int.from_bytes(header[at : at + size_bytes], "little") + (256 if size_bytes == 2 else 0)
    if _last_of_blocks(content, first + at + size_bytes, last) + CHECKSUM_BYTES * checksum != last:
        raise ValueError("is not one zstd frame")
    return size


def _last_of_blocks(content: BinaryIO, at: int, last: int) -> int:
    """One past the last byte of the blocks of a frame, which begin at this byte (RFC 8878, 3.1.1.2)."""
    ended = False
    while not ended and at < last:
        content.seek(at)
        header = int.from_bytes(content.read(BLOCK_HEADER_BYTES), "little")
        ended, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        at += BLOCK_HEADER_BYTES + (1 if kind == RUN else size)
    if not ended:
        raise ValueError("is a zstd frame without an end")
    return at


def _most_packed(size: int) -> int:
    """More than zstd makes of so many bytes that it cannot compress."""
    return size + size // 64 + 1024
