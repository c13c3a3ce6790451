"""A shard's tar seen from outside: which bytes hold which record, their checksums, and the sha256 of all of them.

The headers are read here and not by tarfile, which believes what a stranger's header says of sizes and extensions.
"""

import hashlib
import os
import re
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.damage import plainly

BLOCK = 512
PIECE = 1 << 20
MAGIC, PLAIN_FILE = b"ustar\x0000", b"0"
OCTAL = re.compile(rb"[0-7]{11}\0")
CHECKSUM = re.compile(rb"[0-7]{6}\0 ")
NAME = re.compile(rb"([0-9]{9})\.(json|safetensors)\0+")
PREFIX, LINK = slice(345, BLOCK), slice(157, 257)
"""Of a header: what would be put before the name, and another name; both are empty."""
END_BLOCKS, RECORD = 2, 20 * BLOCK
"""A tar ends with two empty blocks, and its size is a multiple of twenty."""


class Place(NamedTuple):
    """Where the two members of a record lie in their tar, in bytes, and the checksum of all that is between."""

    json_offset: int
    json_size: int
    st_offset: int
    st_size: int
    crc32: int
    """over the record's two tar headers, members and paddings: it tells which record of a damaged shard is spoilt"""

    @property
    def first(self) -> int:
        """The first byte of the record, its tar header."""
        return self.json_offset - BLOCK

    @property
    def last(self) -> int:
        """One past the last byte of the record, with its padding."""
        return _padded(self.st_offset + self.st_size)


class Member(NamedTuple):
    """A file in a tar."""

    key: str
    extension: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return _padded(self.offset + self.size)


def places(tar: Path) -> dict[str, Place]:
    """Key -> place of every record from the first on that is whole.

    A tar cut between two members is a good tar to every reader, and shorter: only a count tells.
    """
    found, at = dict[str, Place](), 0
    with open(tar, "rb", opener=plainly) as content:
        size = os.fstat(content.fileno()).st_size
        while True:
            first = _member(content, at, size)
            second = _member(content, first.end, size) if first else None
            if not first or not second or (second.key, "json") != (first.key, first.extension) or first.key in found:
                return found
            if second.extension != "safetensors" or second.end > size:
                return found
            crc32 = _crc32(content, at, second.end)
            found[first.key] = Place(first.offset, first.size, second.offset, second.size, crc32)
            at = second.end


def spoilt(tar: Path, listed: tuple[Place, ...]) -> int | None:
    """The number of the first record whose bytes are not what they were; None when the damage lies behind them all."""
    with open(tar, "rb", opener=plainly) as content:
        for number, place in enumerate(listed):
            if _crc32(content, place.first, place.last) != place.crc32:
                return number
    return None


def tar_bytes(end: int) -> int:
    """The size of a tar whose last member ends, with its padding, at this byte."""
    return -(-(end + END_BLOCKS * BLOCK) // RECORD) * RECORD


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with open(file, "rb", opener=plainly) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _member(content: BinaryIO, at: int, size: int) -> Member | None:
    """The member whose header is at this byte, if it is whole and of the only kind that is ever written."""
    content.seek(at)
    header = content.read(BLOCK)
    if len(header) < BLOCK or header[257:265] != MAGIC or header[156:157] != PLAIN_FILE:
        return None
    name, length, told = NAME.fullmatch(header[:100]), header[124:136], header[148:156]
    if not name or not OCTAL.fullmatch(length) or not CHECKSUM.fullmatch(told):
        return None
    if any(header[PREFIX]) or any(header[LINK]):
        return None
    if int(told[:6], 8) != sum(header[:148]) + sum(b"        ") + sum(header[156:]):
        return None
    member = Member(name[1].decode(), name[2].decode(), at + BLOCK, int(length[:11], 8))
    return member if member.offset + member.size <= size else None


def _crc32(content: BinaryIO, first: int, last: int) -> int:
    content.seek(first)
    crc32, left = 0, last - first
    while left > 0 and (piece := content.read(min(PIECE, left))):
        crc32, left = zlib.crc32(piece, crc32), left - len(piece)
    return crc32


def _padded(at: int) -> int:
    return -(-at // BLOCK) * BLOCK
