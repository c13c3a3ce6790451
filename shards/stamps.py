"""What this machine has read whole and found right: one small file for each shard, so that a sha256 is taken once.

A stamp says that the file with this inode, size and times had this sha256 when all of it was read here. A file that
was written to since, replaced or copied has other times and is read anew. What no time tells - bits that rot beneath
the file system - is found by `sollune shards verify`, which believes no stamp. Stamps lie in the user's cache folder
(XDG_CACHE_HOME), never in the cache of records, which may be somebody else's; removing them costs one reading.
"""

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from configs.atomic import atomic_write
from configs.refusal import Refused

RESTED_SECONDS = 2.0
"""A file younger than this may change again within one tick of its clock, so it is not yet believed."""


class Facts(NamedTuple):
    """What changes when a file is written to, replaced or copied; even its owner cannot set the last one."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Facts":
        """The facts of an open or closed file."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_stamped(path: Path, sha256: str, facts: Facts) -> bool:
    """Whether this very file was found to have this sha256 before."""
    try:
        return _stamp(path).read_text() == _said(path, sha256, facts)
    except (OSError, RuntimeError, UnicodeDecodeError):
        return False


def stamp(path: Path, sha256: str, facts: Facts) -> None:
    """Remember that this very file has this sha256."""
    if time.time_ns() - max(facts.mtime_ns, facts.ctime_ns) < RESTED_SECONDS * 1e9:
        return
    with suppress(OSError, RuntimeError, Refused):  # without stamps every run reads the shards whole: slower, as safe
        atomic_write(_stamp(path), _said(path, sha256, facts))


def _stamp(path: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{platform.node()}\0{path.resolve()}".encode()).hexdigest()
    return home / "sollune" / "verified" / name[:2] / name[2:]


def _said(path: Path, sha256: str, facts: Facts) -> str:
    return json.dumps({"file": str(path.resolve()), "sha256": sha256, **facts._asdict()}, indent=1) + "\n"
