"""Faults of a cache, opening untrusted files safely, and texts that carry their own sha256 in their last line."""

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from stages.system.refusal import Refused


class Damaged(Refused):
    """A file is not what was written: `sollune shards verify` exits with 1, every other command refuses."""


class Fault(NamedTuple):
    """What is wrong with one file."""

    file: str
    """path inside the cache folder"""
    reason: str
    record: str | None = None
    """key of the first damaged record, where that is known"""

    def message(self, folder: Path) -> str:
        """The line for the user, without a hint."""
        kind = "shard " if self.file.endswith(".tar") else ""
        reason = self.reason.removeprefix(f"{folder / self.file}: ")  # as refusals of this very file begin
        return f"{kind}{folder / self.file}: {reason}{f', first in record {self.record}' if self.record else ''}"


def repair_hint(folder: Path) -> str:
    """The command that mends a cache."""
    return f"sollune shards repair {folder} makes it again"


def checked_path(folder: Path, file: str) -> Path:
    """The path of a cache's own file; raises `Damaged` when it is a link, leads through one, or is no plain file.

    `file` must already be known to be relative and without `..`.
    """
    path = folder
    for part in Path(file).parts:
        path = path / part
        if path.is_symlink():
            raise Damaged(f"{path}: is a link, which may lead anywhere - copy what it points at into its place")
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Damaged(f"{path}: is no plain file - remove it; {repair_hint(folder)}")
    except FileNotFoundError as error:
        raise Damaged(f"{path}: missing - {repair_hint(folder)}") from error
    return path


def open_plain_file(path: str | Path, flags: int) -> int:
    """The opener of every untrusted file; raises `Damaged` for a link, a pipe (opening may block) or a device."""
    if Path(path).is_symlink():
        raise Damaged(f"{path}: is a link, which may lead anywhere - copy what it points at into its place")
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damaged(f"{path}: is no plain file - remove it, and fetch the cache again")
    return handle


def read_at_most(path: Path, max_bytes: int) -> bytes:
    """A plain file's content, unless it has more than `max_bytes`."""
    with open(path, "rb", opener=open_plain_file) as content:
        size = os.fstat(content.fileno()).st_size
        if size > max_bytes:
            raise Damaged(f"{path}: {size:,} bytes, at most {max_bytes:,} are believed - fetch the cache again")
        return content.read(size)


SEAL_PATTERN = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n')
SEAL_BYTES = len('"sha256": ""\n}\n') + 64


def append_seal(body: str) -> str:
    """`body`, an open JSON object, closed by its own sha256."""
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def seal_fault(content: bytes) -> str | None:
    """What is wrong with a sealed text, if anything is."""
    body, seal = content[:-SEAL_BYTES], SEAL_PATTERN.fullmatch(content[-SEAL_BYTES:])
    if not seal:
        return f"has no sha256 in its last line, at byte {max(0, len(content) - SEAL_BYTES)}"
    actual, stored = hashlib.sha256(body).hexdigest(), seal[1].decode()
    if actual != stored:
        return f"sha256 of its first {len(body)} bytes is {actual[:12]}..., it says {stored[:12]}..."
    return None
