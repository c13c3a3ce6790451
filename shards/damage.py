"""What is wrong with a cache that lies on the disk, and files of strangers that are opened without trusting them."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from configs.refusal import Refused


class Damaged(Refused):
    """A file is not what was written: `sollune shards verify` exits with 1, every other command refuses."""


class Fault(NamedTuple):
    """One thing that is wrong."""

    file: str
    """path inside the cache folder"""
    what: str
    record: str | None = None
    """key of the first record that it spoils, where that is known"""

    def told(self, folder: Path) -> str:
        """The line for the user, without the way out."""
        kind = "shard " if self.file.endswith(".tar") else ""
        what = self.what.removeprefix(f"{folder / self.file}: ")  # as refusals of this very file begin
        return f"{kind}{folder / self.file}: {what}{f', first in record {self.record}' if self.record else ''}"


def way_out(folder: Path) -> str:
    """How to mend a cache."""
    return f"sollune shards repair {folder} makes it again"


def inside(folder: Path, file: str) -> Path:
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
            raise Damaged(f"{path}: is no plain file - remove it; {way_out(folder)}")
    except FileNotFoundError as error:
        raise Damaged(f"{path}: missing - {way_out(folder)}") from error
    return path


def plainly(path: str | Path, flags: int) -> int:
    """The opener of every file that a stranger may have made: follows no link, and waits for nobody.

    Opening a pipe would wait for its writer, for ever, and reading a device ends never: raises `Damaged` for both.
    """
    if Path(path).is_symlink():
        raise Damaged(f"{path}: is a link, which may lead anywhere - copy what it points at into its place")
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damaged(f"{path}: is no plain file - remove it, and fetch the cache again")
    return handle


def read_bounded(path: Path, most: int) -> bytes:
    """A plain file's content, unless it has more than `most` bytes."""
    with open(path, "rb", opener=plainly) as content:
        size = os.fstat(content.fileno()).st_size
        if size > most:
            raise Damaged(f"{path}: {size:,} bytes, at most {most:,} are believed - fetch the cache again")
        return content.read(size)
