"""Bounded copies of large objects on this machine: fetched whole when they are read, the least recently used removed.

The processes of a machine share them: a lock is held while a copy is read or fetched, and alone to remove it.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from stages.system.atomic import temporary_path
from stages.system.disk import free_bytes
from stages.system.refusal import Refused
from stages.system.storage.holders import LOCKS_FOLDER, give_up_copy, room_wanted
from stages.system.storage.lease import confirm_claims
from stages.system.storage.locations import BYTES_VARIABLE, Location, location_of, storage_folder
from stages.system.storage.object_store import ObjectStore, store_of
from stages.system.storage.sync_state import (
    ABSENT,
    RESERVED,
    SyncedFile,
    forget_synced,
    replace_synced,
    synced_file,
    synced_files,
    write_synced,
)

SHARD = re.compile(r"(.*/)?data/[^/]+\.tar")
"""The files that are fetched when they are read."""
WAIT_SECONDS, POLL_SECONDS = 60.0, 0.05
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


class Hold:
    """A copy that is not removed as long as this lives."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, -1
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
    if (location := location_of(path)) is None:
        return None
    path = location.folder  # a link to it is the same copy
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
    if (location := location_of(path)) is None:
        return
    path = location.folder
    row = synced_file(path)
    if row is not None and row.is_of(path):
        _remove_copy(path, row)


def _remove_copy(path: Path, row: SyncedFile) -> None:
    """Remove a copy, the file first: one that is here without its row counts as made here, and is sent."""
    path.unlink(missing_ok=True)
    replace_synced(path, row, row._replace(mtime_ns=ABSENT))


def delete_stored(path: Path) -> None:
    """Delete the object of a path in a working folder, which then counts as missing; nothing for any other path."""
    if (location := location_of(path)) is not None:
        store = store_of(location)
        confirm_claims(location.folder, store)
        store.delete(location)
        forget_synced(location.folder)


def stored_size(path: Path) -> int | None:
    """The bytes of an object of which no copy is here; None for a path of this machine, or where there is none."""
    location = location_of(path)
    if location is None:
        return None
    if row := synced_file(location.folder):
        return row.size
    stored = store_of(location).info(location)
    if stored is None:
        return None
    write_synced(location.folder, SyncedFile(stored.size, ABSENT, stored.version))
    return stored.size


def limit_bytes() -> int:
    """What all copies may take: SOLLUNE_STORAGE_BYTES, or else half of what was free at first, with what they took."""
    text = os.environ.get(BYTES_VARIABLE, "").strip()
    if not text:
        return _default_limit(storage_folder())
    match = BYTES.fullmatch(text)
    if match is None or not (limit := int(float(match[1]) * UNITS[(match[2] or "").lower()])):
        raise Refused(f"{BYTES_VARIABLE}={text}: should be bytes such as 200GB or 50GiB - mend the variable")
    return limit


@lru_cache
def _default_limit(folder: Path) -> int:
    """Measured once by each process: a checkpoint that appears later would lower it below what is held."""
    return (free_bytes(folder) + sum(row.size for _, row in _copies())) // 2


def reserve_room(path: Path, size: int) -> None:
    """Make room for a copy, and count it from now on; others fetch, and remove, while this waits.

    Raises `Refused` where the copies that are read leave no room for long.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    is_waiting = False
    with ExitStack() as waiting:
        while True:
            with folder_lock(storage_folder()):
                if (excess := make_room(size)) <= 0:
                    write_synced(path, SyncedFile(size, RESERVED, ""))
                    return
            if size > limit_bytes() or time.monotonic() > deadline:
                raise Refused(
                    f"{storage_folder()}: {excess:,} bytes too few for the shards that are read at once, of "
                    f"{limit_bytes():,} - raise {BYTES_VARIABLE}, or make smaller shards (render.records_per_shard)"
                )
            if not is_waiting:
                waiting.enter_context(room_wanted())
                is_waiting = True
            time.sleep(POLL_SECONDS)


def make_room(size: int) -> int:
    """Remove the copies that were used least recently until `size` more bytes fit; returns how many still do not.

    Those that this process holds go after all others; those that are read, or that another process holds, stay. Where
    something else fills the disk, copies make way, too.
    """
    limit, copies = limit_bytes(), sorted(_copies(), key=lambda copy: _last_use(copy[0]))
    excess = sum(row.size for _, row in copies) + size - limit
    coming = size + sum(row.size for _, row in copies if row.mtime_ns == RESERVED)
    short = coming - free_bytes(storage_folder()) if size else 0
    for are_held in (False, True) if size else (False,):
        for path, row in list(copies):
            if excess <= 0 and short <= 0:
                return 0
            if are_held:
                give_up_copy(path)
            if _remove(path, row):
                copies.remove((path, row))
                excess, short = excess - row.size, short - row.size
    return max(0, excess)


def _remove(path: Path, row: SyncedFile) -> bool:
    """Remove a copy, also one that a killed process was fetching; False while somebody holds it."""
    hold = Hold(path)
    if not hold.lock_at_once():
        return False
    _remove_copy(path, row)
    return True


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
    reserve_room(path, size)
    try:
        fetch_synced(store_of(location), location, path)
    except BaseException:
        forget_synced(path)
        raise


def fetch_synced(store: ObjectStore, location: Location, path: Path) -> None:
    """Fetch an object into a file that appears whole and with its row, so that no thread takes it for one made here.

    Raises `FileNotFoundError` where there is none.
    """
    fetched = temporary_path(path.with_name(lock_file(path).name))  # of a length that does not grow with the name's
    try:
        stored = store.get_whole(location, fetched)
        write_synced(path, SyncedFile.of(fetched, stored.version))
        fetched.replace(path)
    finally:
        fetched.unlink(missing_ok=True)


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
