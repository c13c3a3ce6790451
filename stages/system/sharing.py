"""What several processes share on disk: one of them makes it while the others wait, and all link to it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def made_by_one(place: Path) -> Iterator[None]:
    """Let one process at a time into the block, by a lock file beside `place`, whose folder is made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".lock"), "w") as lock:
        with suppress(OSError):  # a file system without locks: all make the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link(place: Path, target: Path) -> None:
    """Make `place` a link to `target`, where that exists, in place of an older link."""
    target = target.resolve()
    if target.exists() and not (place.is_symlink() and place.resolve() == target):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)
