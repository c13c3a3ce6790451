"""A working folder and its location are kept the same: brought at the start, sent in the background while files appear.

Whatever a reader of the bucket meets is whole: an object appears at once, and a file that names others (an entry of the
journal, a manifest, a checkpoint's `state.json`, `COMPLETE`) is read before they are listed and sent after them.
Hidden files stay here, as everywhere in this program they are unfinished. Shards are brought when they are read.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stages.system.disk import hint_for, path_of_error
from stages.system.refusal import Refused, in_one_line
from stages.system.storage.lease import LEASE_SECONDS, confirm_claims, forget_ended
from stages.system.storage.local_copy import SHARD, folder_lock, make_room
from stages.system.storage.locations import Location, location_of, shown_here
from stages.system.storage.names import by_rank, rank
from stages.system.storage.object_store import MAX_PIPED_BYTES, store_of
from stages.system.storage.sync_state import (
    SyncedFile,
    forget_sending,
    forget_synced,
    note_sending,
    synced_file,
    write_synced,
)
from stages.system.storage.working_folder import WorkingFolder

POLL_SECONDS = 3.0
LAST_LOOKS = 3


@dataclass(frozen=True)
class Change:
    """A file that is to be sent, with the content that was read first, if it names others."""

    name: str
    content: bytes | None
    row: SyncedFile


class Mirror(WorkingFolder):
    """A working folder whose changes are sent to its location."""

    _descriptor: int | None = None
    """Of the folder that was looked at: another one of its name is none that lost files."""

    def __init__(self, location: Location) -> None:
        super().__init__(location, store_of(location))
        self._seen: set[str] = set()
        """Files that were here while this process looked: one that is gone was deleted here."""
        self._gone: set[str] = set()
        """Those that were gone at the last look."""
        self._is_undecided = False
        self._lock, self._lease_lock = threading.Lock(), threading.Lock()
        self._lease_time = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)
        self.problem: Exception | None = None

    def bring(self, *, again: bool = True) -> None:
        """Bring it, as `WorkingFolder.bring` does; what is here then was seen."""
        super().bring(again=again)
        forget_ended(self.folder)
        self._seen = set(self._local_files())

    def start(self) -> None:
        """Send what changes from now on."""
        self._thread.start()

    def send(self) -> None:
        """Send every file that changed, and delete those that are gone; what names others goes last.

        Raises `Refused` where the store, or this machine's system, fails; the next call sends what is left.
        """
        try:
            with self._lock, folder_lock(self.folder):
                self._send_changes()
            make_room(0)
        except OSError as error:
            at_fault = path_of_error(error) or shown_here(self.folder)
            reason = error.strerror or in_one_line(error)
            raise Refused(f"{self.location}: cannot be sent ({at_fault}: {reason}) - {hint_for(error)}") from error

    def close(self) -> None:
        """Send what is left; raises `Refused` where that fails, with everything still here."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.send()
        for _ in range(LAST_LOOKS):
            if self._is_undecided:  # gone since the last look, so another one decides
                time.sleep(POLL_SECONDS)
                self.send()
        self._close_folder()

    def _send_changes(self) -> None:
        rows = self._rows()
        changes = self._changes(rows)
        here = set(self._local_files())
        if self._was_removed(here):  # nobody deletes a run by clearing a cache
            raise Refused(f"{self.location}: {shown_here(self.folder)} was removed - the same command brings it again")
        gone = {name for name in self._seen & rows.keys() - here if rows[name].mtime_ns >= 0}  # not to make room
        gone -= {change.name for change in changes}
        deletable = {name for name in gone if not SHARD.fullmatch(name)}
        # As long as more goes with each look, the folder may be about to go as a whole.
        surely = deletable if gone <= self._gone else set()
        self._gone, self._is_undecided = gone, surely != deletable
        deleted = [(name, rows[name]) for name in sorted(surely, key=rank)]
        if changes or deleted:
            self._confirm_claims()
        self._in_threads(self._delete, [each for each in deleted if rank(each[0])])
        for _, group in by_rank(change.name for change in changes):
            self._in_threads(self._send_file, [change for change in changes if change.name in group])
        self._in_threads(self._delete, [each for each in deleted if not rank(each[0])])
        self._seen |= here

    def _was_removed(self, here: Set[str]) -> bool:
        """Whether files that were seen are gone with their folder: there is none, an empty one, or another one."""
        lasting = {name for name in self._seen if not SHARD.fullmatch(name)}
        if lasting and not lasting & here:
            return True
        if not self._is_same_folder():
            if lasting - here:
                return True
            self._close_folder()
        if self._descriptor is None:
            with suppress(FileNotFoundError, NotADirectoryError):  # nothing is here yet, or it is a single file
                self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return False

    def _is_same_folder(self) -> bool:
        """Whether the folder of this name is the one that was looked at before."""
        try:
            return self._descriptor is None or os.path.samestat(os.fstat(self._descriptor), self.folder.stat())
        except FileNotFoundError:
            return False

    def _close_folder(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self._close_folder()

    def _confirm_claims(self, age: float = 0.0) -> None:
        """Raise `Refused` where another machine took this work over; what was confirmed for `age` s counts."""
        with self._lease_lock:
            if (now := time.monotonic()) - self._lease_time >= age:
                confirm_claims(self.folder, self._store)
                self._lease_time = now

    def _changes(self, rows: dict[str, SyncedFile]) -> list[Change]:
        """The files that are not as they were sent; those that name others are read before the rest is listed."""
        changes: dict[str, Change] = {}
        marks = sorted(filter(rank, self._local_files()), key=rank, reverse=True)
        for names in (marks, None):
            for name in names if names is not None else self._local_files():
                if name in changes or (names is None and rank(name)):
                    continue
                path, row = self._path(name), rows.get(name)
                with suppress(FileNotFoundError):  # deleted, or renamed, meanwhile
                    if row is None or not row.is_of(path):
                        now = SyncedFile.of(path, "")
                        changes[name] = Change(name, path.read_bytes() if rank(name) else None, now)
        return list(changes.values())

    def _send_file(self, change: Change) -> None:
        self._confirm_claims(LEASE_SECONDS)
        path, content = self._path(change.name), change.content
        with self._lock_of(change.name):
            row = synced_file(path)
            if row is not None and row._replace(version="") == change.row:  # it was fetched or sent by now
                return
            try:
                if content is None and path.stat().st_size <= MAX_PIPED_BYTES:  # it may grow meanwhile
                    content = path.read_bytes()
                if content is not None:
                    note_sending(path, hashlib.sha256(content).hexdigest())
                stored = self._store.put_whole(self._place(change.name), path if content is None else content)
            except FileNotFoundError:  # a checkpoint that is not kept any more
                return
            # A log that grew while it was sent keeps its earlier time, and is sent again.
            write_synced(path, change.row._replace(version=stored.version))
            forget_sending(path)

    def _delete(self, named_row: tuple[str, SyncedFile]) -> None:
        self._confirm_claims(LEASE_SECONDS)
        name, row = named_row
        path = self._path(name)
        with self._lock_of(name):
            if synced_file(path) == row and not path.exists():  # else another thread brings it anew
                self._store.delete(self._place(name))
                forget_synced(path)
        self._seen.discard(name)

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                self.send()
            except Exception as error:  # the files are here, and the next round tries again, whatever it is
                if self.problem is None:
                    print_error(error)
                self.problem = error
            else:
                self.problem = None


def print_error(error: Exception) -> None:
    """Print what is wrong with a location on standard error, in one line."""
    named = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {in_one_line(error)}"
    print(f"storage: {named}", file=sys.stderr, flush=True)


def bring_folder(folder: Path, *, again: bool = True) -> None:
    """Bring what other machines changed in a folder; nothing for a path of this machine.

    What a running command removed here is not brought `again`.
    """
    if (location := location_of(folder)) is not None:
        Mirror(location).bring(again=again)


def send_folder(folder: Path) -> None:
    """Send now what changed in a folder; nothing for a path of this machine."""
    if (location := location_of(folder)) is not None:
        Mirror(location).send()
