"""Files that appear whole or not at all."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.system.disk import refuse_unwritable, refuse_write_errors
from stages.system.ownership import is_alive, process_token

PARTIAL_SUFFIX = ".partial"
ABANDONED_AFTER_SECONDS = 3600.0
FOLDER_FSYNC_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""Raised by file systems that cannot make a folder durable, such as some network file systems."""


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in FOLDER_FSYNC_UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """A temporary name beside `path` that holds this process's token."""
    return path.with_name(f".{path.name}.{process_token()}{PARTIAL_SUFFIX}")


def is_abandoned(path: Path) -> bool:
    """Whether no process writes this temporary file any more; where that cannot be seen, its age decides."""
    alive = is_alive(path.name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[2])
    try:
        return not alive if alive is not None else time.time() - path.stat().st_mtime > ABANDONED_AFTER_SECONDS
    except FileNotFoundError:
        return False


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two names are of one file, by any spelling and through links; neither need be there."""
    try:
        if one.samefile(other):  # also two spellings where case does not count
            return True
    except OSError:
        pass
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to `path` when the block succeeds, removed when it raises.

    A link of that name is replaced, not followed. Raises `Refused`, naming `path` and the reason, for system errors.
    """
    temporary = temporary_path(path)
    with refuse_write_errors(path):
        refuse_unwritable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            with suppress(OSError):  # on a failing disk this fails too, and would hide the first error
                temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
