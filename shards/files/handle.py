"""A file open for reading, what identifies it, and the stamps that say that its sha256 was once right.

A stamp in the user's cache folder (XDG_CACHE_HOME, never the cache of records, which may belong to another user) holds
that the file with this inode, size and times had this sha256 when all of it was read on this machine. A file that was
written to since, replaced or copied has other times and is read again. Bits that rot beneath the file system change no
time: `sollune shards verify` finds them, because it uses no stamp. Removing stamps costs one reading.
"""

import hashlib
import json
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from shards.integrity import open_plain_file
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused
from stages.system.storage.local_copy import Hold

DEFAULT_READ_AHEAD_BYTES = 128 << 10
RESTED_SECONDS = 2.0
"""A file younger than this may change again within one tick of its clock, so it is not stamped yet."""


class FileIdentity(NamedTuple):
    """What changes when a file is written to, replaced or copied; even its owner cannot set the last one."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> "FileIdentity":
        """The identity of an open or closed file."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def is_stamped(path: Path, sha256: str, identity: FileIdentity) -> bool:
    """Whether a stamp holds that this very file has this sha256."""
    try:
        return _stamp_path(path).read_text() == _stamp_text(path, sha256, identity)
    except (OSError, RuntimeError, UnicodeDecodeError):
        return False


def write_stamp(path: Path, sha256: str, identity: FileIdentity) -> None:
    """Stamp this very file with its sha256, unless it is too young."""
    if time.time_ns() - max(identity.mtime_ns, identity.ctime_ns) < RESTED_SECONDS * 1e9:
        return
    with suppress(OSError, RuntimeError, Refused):  # without stamps every run reads the shards whole: slower, as safe
        atomic_write(_stamp_path(path), _stamp_text(path, sha256, identity))


def _stamp_path(path: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{platform.node()}\0{path.resolve()}".encode()).hexdigest()
    return home / "sollune" / "verified" / name[:2] / name[2:]


def _stamp_text(path: Path, sha256: str, identity: FileIdentity) -> str:
    return json.dumps({"file": str(path.resolve()), "sha256": sha256, **identity._asdict()}, indent=1) + "\n"


def most_descriptors() -> int:
    """How many files all readers of this process may have open: half of what the system lets it open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit // 2


class ShardHandle:
    """One open file; it closes with its last reference, in whichever thread that was."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.hold: Hold | None = None
        """keeps the copy of a remote shard on this machine"""
        self.fd = open_plain_file(path, os.O_RDONLY | os.O_CLOEXEC)
        self.identity = FileIdentity.from_stat(os.fstat(self.fd))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def fetch(self, first: int, size: int) -> None:
        """Let the system read these bytes into its memory, without waiting for them."""
        piece = read_ahead_bytes(self.identity.device)
        for offset in range(first, first + size, piece):
            os.posix_fadvise(self.fd, offset, min(piece, first + size - offset), os.POSIX_FADV_WILLNEED)

    def is_unchanged(self) -> bool:
        """Whether the open file is as it was when it was opened."""
        return FileIdentity.from_stat(os.fstat(self.fd)) == self.identity


@lru_cache(maxsize=64)
def read_ahead_bytes(device: int) -> int:
    """The most that Linux fetches of a file on this device when it is advised to: of a longer span only the beginning.

    Of a file system that does not tell it, the default of Linux.
    """
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return max(int(setting.read_text()) << 10, DEFAULT_READ_AHEAD_BYTES)
    except (OSError, ValueError):
        return DEFAULT_READ_AHEAD_BYTES
