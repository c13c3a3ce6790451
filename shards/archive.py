"""The files of a cache: records inside a tar by byte, checksums, and the manifest's entry of each file.

Tar headers are parsed here and not by tarfile, which trusts the sizes and extensions of an untrusted header.
"""

import hashlib
import os
import re
import zlib
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from configs.values import PictureSize, Size, Stored
from shards.codec import MAX_JSON_BYTES
from shards.files.local_copy import absent_fault, obtained
from shards.integrity import Damaged, checked_path, open_plain_file
from shards.record import MAX_RECORD_BYTES, MIN_STATE_BYTES, Split

TAR_BLOCK_BYTES = 512
READ_BYTES = 1 << 20
MAGIC, PLAIN_FILE = b"ustar\x0000", b"0"
OCTAL = re.compile(rb"[0-7]{11}\0")
CHECKSUM = re.compile(rb"[0-7]{6}\0 ")
MEMBER_NAME = re.compile(rb"([0-9]{9})\.(json|safetensors)\0+")
PREFIX_FIELD, LINK_FIELD = slice(345, TAR_BLOCK_BYTES), slice(157, 257)
"""Of a header: the prefix of the name, and the target of a link; both are empty."""
END_BLOCKS, TAR_RECORD_BYTES = 2, 20 * TAR_BLOCK_BYTES
"""A tar ends with two empty blocks, and its size is a multiple of twenty."""


class RecordSpan(NamedTuple):
    """Byte offsets and sizes of the two members of a record in their tar, and a checksum."""

    json_offset: int
    json_size: int
    st_offset: int
    st_size: int
    crc32: int
    """over the record's two tar headers, members and paddings, so that the damaged record of a shard can be named"""

    @property
    def first(self) -> int:
        """The first byte of the record, its tar header."""
        return self.json_offset - TAR_BLOCK_BYTES

    @property
    def last(self) -> int:
        """One past the last byte of the record, with its padding."""
        return _pad_to_block(self.st_offset + self.st_size)


class TarMember(NamedTuple):
    key: str
    extension: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The offset of the next header."""
        return _pad_to_block(self.offset + self.size)


def record_spans(tar: Path) -> dict[str, RecordSpan]:
    """Key -> span of every record, in order, up to the first that is not whole.

    A tar cut between two members is a valid, shorter tar: only the count of records tells.
    """
    spans, at = dict[str, RecordSpan](), 0
    with open(tar, "rb", opener=open_plain_file) as content:
        size = os.fstat(content.fileno()).st_size
        while True:
            first = _read_member(content, at, size)
            second = _read_member(content, first.end, size) if first else None
            if not first or not second or first.key in spans or second.end > size:
                return spans
            if (first.extension, second.extension, second.key) != ("json", "safetensors", first.key):
                return spans
            crc32 = _crc32(content, at, second.end)
            spans[first.key] = RecordSpan(first.offset, first.size, second.offset, second.size, crc32)
            at = second.end


def tar_bytes(end: int) -> int:
    """The size of a tar whose last member ends, with its padding, at this byte."""
    return -(-(end + END_BLOCKS * TAR_BLOCK_BYTES) // TAR_RECORD_BYTES) * TAR_RECORD_BYTES


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with open(file, "rb", opener=open_plain_file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sha256_fault(file: Path, expected: str) -> str | None:
    actual = sha256_of(file)
    return None if actual == expected else f"sha256 {actual[:12]}..., manifest says {expected[:12]}..."


def _read_member(content: BinaryIO, offset: int, size: int) -> TarMember | None:
    """The member whose header is at this byte, if it is whole and of the only kind that is ever written."""
    content.seek(offset)
    header = content.read(TAR_BLOCK_BYTES)
    if len(header) < TAR_BLOCK_BYTES or header[257:265] != MAGIC or header[156:157] != PLAIN_FILE:
        return None
    name, length, checksum = MEMBER_NAME.fullmatch(header[:100]), header[124:136], header[148:156]
    if not name or not OCTAL.fullmatch(length) or not CHECKSUM.fullmatch(checksum):
        return None
    if any(header[PREFIX_FIELD]) or any(header[LINK_FIELD]):
        return None
    if int(checksum[:6], 8) != sum(header[:148]) + sum(b"        ") + sum(header[156:]):
        return None
    member = TarMember(name[1].decode(), name[2].decode(), offset + TAR_BLOCK_BYTES, int(length[:11], 8))
    return member if member.offset + member.size <= size else None


def _crc32(content: BinaryIO, first: int, last: int) -> int:
    content.seek(first)
    crc32, left = 0, last - first
    while left > 0 and (piece := content.read(min(READ_BYTES, left))):
        crc32, left = zlib.crc32(piece, crc32), left - len(piece)
    return crc32


def _pad_to_block(offset: int) -> int:
    return -(-offset // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


Count = Annotated[int, Field(ge=1, lt=1 << 48)]
Key = Annotated[str, Field(pattern=r"^[0-9]{9}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SHARD_FILE = re.compile(r"data/(train|validation)-(?:([1-9][0-9]{0,4}x[1-9][0-9]{0,4})-)?([0-9]{6})\.tar")
ShardFile = Annotated[str, Field(pattern=f"^{SHARD_FILE.pattern}$")]
TableFile = Annotated[str, Field(pattern=r"^table\.zarr/([a-z0-9_]+/)*(zarr\.json|[0-9]+)$")]


class Shard(Stored):
    """One finished tar of the cache; all its records have the same number of states, and pictures of one size."""

    file: ShardFile
    """path inside the cache folder; the pattern keeps it from leading out of it"""
    split: Split
    size: Size | None = None
    """of its pictures; None in schema 1, whose entries have no such field"""
    records: Count
    draws: Count
    """stored states, of all its records"""
    bytes: Count
    sha256: Sha256
    first_key: Key
    last_key: Key
    offsets: tuple[RecordSpan, ...]
    """in the order of the tar"""

    @model_validator(mode="after")
    def _check_consistency(self) -> "Shard":
        if not self.file.startswith(f"data/{self.split}-"):
            raise ValueError(f"{self.file} is not of split {self.split}")
        if self.size_in_name not in (None, self.size):
            raise ValueError(f"{self.file} is named otherwise than its size {self.size}")
        if self.draws % self.records or len(self.offsets) != self.records or self.last_key < self.first_key:
            raise ValueError(f"{self.file}: its counts do not agree")
        end = 0
        for span in self.offsets:
            gap = span.st_offset - span.json_offset - span.json_size
            if span.first != end or not 512 <= gap < 1024 or min(span.json_size, span.st_size) < 1:
                raise ValueError(f"{self.file}: places a record at byte {span.json_offset}, where none can lie")
            if span.json_size > MAX_JSON_BYTES or span.st_size > MAX_RECORD_BYTES:
                raise ValueError(f"{self.file}: places a record of {span.st_size} bytes at byte {span.json_offset}")
            if self.states_per_record * MIN_STATE_BYTES > span.st_size:
                raise ValueError(f"{self.file}: {self.states_per_record} states in a record of {span.st_size} bytes")
            end = span.last
        if self.bytes != tar_bytes(end):
            raise ValueError(f"{self.file}: its records end at byte {end} of {self.bytes}")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_unknown_size(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return fields if self.size is not None else {name: fields[name] for name in fields if name != "size"}

    @property
    def size_in_name(self) -> PictureSize | None:
        """The size in the name of the file, which it has in a cache of several sizes."""
        return size_in_name(self.file)

    @property
    def states_per_record(self) -> int:
        """K of every record in this shard."""
        return self.draws // self.records

    def size_fault(self, folder: Path) -> str | None:
        """What is wrong, as far as the file's size tells."""
        path = folder / self.file
        if not path.is_file() and not path.is_symlink():
            return absent_fault(path, self.bytes)
        try:
            size = checked_path(folder, self.file).stat().st_size
        except (Damaged, FileNotFoundError):
            if os.path.lexists(path):
                raise
            return absent_fault(path, self.bytes)  # a copy of a remote one, which made room this moment
        if size == self.bytes:
            return None
        records = len(record_spans(path))
        if records != self.records:
            return f"{records} records, manifest says {self.records}"
        return f"{size} bytes, manifest says {self.bytes}"

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the file's content; reads all of it."""
        with obtained(folder / self.file, self.bytes) as path:
            return self.size_fault(folder) or _sha256_fault(path, self.sha256)

    def first_damaged_key(self, folder: Path) -> str | None:
        """Key and offset of the first record whose checksum is wrong; None when that cannot be determined."""
        if not (folder / self.file).is_file():
            return None
        gapless = int(self.last_key) - int(self.first_key) + 1 == self.records
        with open(folder / self.file, "rb", opener=open_plain_file) as content:
            for number, span in enumerate(self.offsets):
                if _crc32(content, span.first, span.last) != span.crc32:
                    name = f"{int(self.first_key) + number:09d}" if gapless else f"number {number}"
                    return f"{name} at byte {span.json_offset}"
        return None

    def offsets_fault(self, folder: Path) -> str | None:
        """What is wrong with the manifest's offsets into a tar whose content is right."""
        with obtained(folder / self.file, self.bytes) as path:
            spans = record_spans(path)
        if len(spans) != self.records:
            return f"{len(spans)} records, manifest says {self.records}"
        if (min(spans), max(spans)) != (self.first_key, self.last_key) or tuple(spans.values()) != self.offsets:
            return "its records lie elsewhere than the manifest says"
        return None


def size_in_name(file: str) -> PictureSize | None:
    """The picture size in the path of a shard; None where the cache has one size."""
    match = SHARD_FILE.fullmatch(file)
    return PictureSize.parse(match[2]) if match and match[2] else None


class Failure(Stored):
    """A prompt that could not be rendered, and why."""

    file: ShardFile
    """the shard that should hold it"""
    key: Key
    reason: str


class TableEntry(Stored):
    """One file of the table as it was written."""

    file: TableFile
    bytes: Count
    sha256: Sha256

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the file; reads all of it."""
        path = folder / self.file
        if not path.exists() and not path.is_symlink():
            return "missing"
        size = checked_path(folder, self.file).stat().st_size
        return f"{size} bytes, manifest says {self.bytes}" if size != self.bytes else _sha256_fault(path, self.sha256)
