"""Files that appear whole or not at all."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.owner import lives, owner
from configs.refusal import Refused

PARTIAL = ".partial"
FORGOTTEN_SECONDS = 3600.0
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unfinished(path: Path) -> Path:
    """A temporary name beside `path` that says whose it is."""
    return path.with_name(f".{path.name}.{owner()}{PARTIAL}")


def is_left_over(path: Path) -> bool:
    """Whether nobody writes this `unfinished` file any more; a stranger's counts as forgotten after an hour."""
    alive = lives(path.name.removesuffix(PARTIAL).rpartition(".")[2])
    try:
        return not alive if alive is not None else time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS
    except FileNotFoundError:
        return False


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to it when the block ends well, removed when it does not.

    Raises `Refused` when the disk is full, with the name of the file that could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise Refused(
            f"{path}: cannot be written ({error.strerror}) - free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
