"""Bounded copies of large objects on this machine: fetched whole when they are read, the least recently used removed.

The processes of a machine share them: a lock is held while a copy is read or fetched, and alone to remove it.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.system.disk import free_bytes
from stages.system.refusal import Refused
from stages.system.storage.locations import BYTES_VARIABLE, location_of, storage_folder
from stages.system.storage.object_store import store_of
from stages.system.storage.sync_state import (
    ABSENT,
    RESERVED,
    SyncedFile,
    forget_synced,
    synced_file,
    synced_files,
    write_synced,
)

SHARD = re.compile(r"(.*/)?data/[^/]+\.tar")
"""The files that are fetched when they are read."""
LOCKS_FOLDER = ".locks"
WAIT_SECONDS, POLL_SECONDS = 60.0, 0.05
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


class Hold:
    """A copy that is not removed as long as this lives."""

    def __init__(self, path: Path) -> None:
        self._lock = -1
        self._lock = os.open(lock_file(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def lock(self, operation: int) -> None:
        """Lock it, shared or alone; the file's time tells when it was used last."""
        fcntl.flock(self._lock, operation)
        now = time.time_ns()  # the system's own time of a file moves in steps of milliseconds
        os.utime(self._lock, ns=(now, now))

    def lock_at_once(self) -> bool:
        """Lock it alone; False while another has it. Its time stays."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """End it now: an error keeps its frames alive, and what they hold."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def __del__(self) -> None:
        self.release()


def hold_copy(path: Path, size: int) -> Hold | None:
    """Fetch the object of a path in a working folder, unless it is here, and keep it here; None for any other path.

    `size` is what it should have; whether it is the right file is for its reader to see.
    Raises `FileNotFoundError` where the store has no such object.
    """
    if location_of(path) is None:
        return None
    hold = Hold(path)
    try:
        hold.lock(fcntl.LOCK_SH)  # before it is here, so that nobody removes it in between
        if not path.is_file():
            with folder_lock(path.with_name(f".{path.name}.fetch")):  # readers of a dropped copy wait for nothing
                if not path.is_file():
                    _fetch(path, size)
    except BaseException:
        hold.release()
        raise
    return hold


def drop_copy(path: Path) -> None:
    """Remove a copy that is not what it should be; a file that was made here, and is nowhere else, stays."""
    row = synced_file(path)
    if row is not None and row.is_of(path):
        write_synced(path, row._replace(mtime_ns=ABSENT))
        path.unlink(missing_ok=True)


def delete_stored(path: Path) -> None:
    """Delete the object of a path in a working folder, which then counts as missing; nothing for any other path."""
    if (location := location_of(path)) is not None:
        store_of(location).delete(location)
        forget_synced(path)


def stored_size(path: Path) -> int | None:
    """The bytes of an object of which no copy is here; None for a path of this machine, or where there is none."""
    location = location_of(path)
    if location is None:
        return None
    if row := synced_file(path):
        return row.size
    stored = store_of(location).info(location)
    if stored is None:
        return None
    write_synced(path, SyncedFile(stored.size, ABSENT, stored.version))
    return stored.size


def limit_bytes() -> int:
    """What all copies may take: SOLLUNE_STORAGE_BYTES, or else half of what is free and what they take already."""
    text = os.environ.get(BYTES_VARIABLE, "").strip()
    if not text:
        return (free_bytes(storage_folder()) + sum(row.size for _, row in _copies())) // 2
    match = BYTES.fullmatch(text)
    if match is None or not (limit := int(float(match[1]) * UNITS[(match[2] or "").lower()])):
        raise Refused(f"{BYTES_VARIABLE}={text}: should be bytes such as 200GB or 50GiB - mend the variable")
    return limit


def make_room(size: int) -> None:
    """Remove the copies that were used least recently until `size` more bytes fit; those that are read stay.

    Raises `Refused` where those alone leave no room for long.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while (excess := _remove_oldest(size)) > 0 and size:
        if size > limit_bytes() or time.monotonic() > deadline:
            raise Refused(
                f"{storage_folder()}: {excess:,} bytes too few for the shards that are read at once, of "
                f"{limit_bytes():,} - raise {BYTES_VARIABLE}, or make smaller shards (render.records_per_shard)"
            )
        time.sleep(POLL_SECONDS)


def _remove_oldest(size: int) -> int:
    """The bytes that are too many still, with `size` more; what fits is reserved by the caller's own lock."""
    limit, copies = limit_bytes(), _copies()
    excess = sum(row.size for _, row in copies) + size - limit
    if excess <= 0:
        return 0
    for path, row in sorted(copies, key=lambda copy: _last_use(copy[0])):
        hold = Hold(path)
        if not hold.lock_at_once():
            continue
        write_synced(path, row._replace(mtime_ns=ABSENT))  # also one that a killed process was fetching
        path.unlink(missing_ok=True)
        excess -= row.size
        if excess <= 0:
            break
    return excess


def _copies() -> list[tuple[Path, SyncedFile]]:
    """The copies that are here or being fetched, and are in the store too."""
    rows = synced_files(storage_folder()).items()
    return [
        (path, row)
        for path, row in rows
        if SHARD.fullmatch(str(path)) and row.mtime_ns != ABSENT and (row.mtime_ns == RESERVED or row.is_of(path))
    ]


def _fetch(path: Path, size: int) -> None:
    location = location_of(path)
    if location is None:
        raise ValueError(f"{path} is in no working folder")
    with folder_lock(storage_folder()):
        make_room(size)
        write_synced(path, SyncedFile(size, RESERVED, ""))
    try:
        stored = store_of(location).get_whole(location, path)
    except BaseException:
        forget_synced(path)
        raise
    write_synced(path, SyncedFile.of(path, stored.version))


def _last_use(path: Path) -> int:
    with suppress(FileNotFoundError):
        return lock_file(path).stat().st_mtime_ns
    return 0


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """One process at a time does this part of the work on a folder."""
    with open(lock_file(path), "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def lock_file(path: Path) -> Path:
    """The lock of a path in a working folder."""
    folder = storage_folder() / LOCKS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder / hashlib.sha256(str(path).encode()).hexdigest()[:32]
