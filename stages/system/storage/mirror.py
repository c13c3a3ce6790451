"""A working folder and its location are kept the same: brought at the start, sent in the background while files appear.

Whatever a reader of the bucket meets is whole: an object appears at once, and a file that names others (an entry of the
journal, a manifest, a checkpoint's `state.json`, `COMPLETE`) is read before they are listed and sent after them.
Hidden files stay here, as everywhere in this program they are unfinished. Shards are brought when they are read.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.system.atomic import temporary_path
from stages.system.disk import FREE_SPACE_HINT, file_sha256, free_bytes, hint_for
from stages.system.refusal import Refused
from stages.system.storage.local_copy import SHARD, folder_lock, make_room
from stages.system.storage.locations import Location, location_of, shown_here
from stages.system.storage.object_store import StoredObject, store_of
from stages.system.storage.sync_state import ABSENT, SyncedFile, forget_synced, synced_files, write_synced

POLL_SECONDS = 3.0
THREADS = 8
START_TRIES = 4
MARKS = ("COMPLETE", "state.json", "manifest.json", "model_index.json", "origin.json")
"""Files that name others, or mean that they are whole: what is first is sent last."""
ENTRY = re.compile(r"(.*/)?journal/[^/]+\.json")
CHECKPOINT_FILE = re.compile(r"(.*checkpoints/[0-9]+/)[^/]+")


@dataclass(frozen=True)
class Change:
    """A file that is to be sent, with the content that was read first, if it names others."""

    name: str
    content: bytes | None
    row: SyncedFile


class Mirror:
    """One location and its working folder."""

    def __init__(self, location: Location) -> None:
        self.location, self.folder, self._store = location, location.folder, store_of(location)
        self._seen: set[str] = set()
        """Files that were here while this process looked: one that is gone was deleted here."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storage", daemon=True)
        self.problem: Refused | None = None

    def bring(self) -> None:
        """Make the working folder what the location holds, but for shards and what is newer here.

        Raises `Refused` for a file that changed on both sides, and where the disk is too small.
        """
        with folder_lock(self.folder):
            stored = self._stored_files()
            missing = list(self._missing_files(stored))
            needed = sum(stored[name].size for name in missing)
            if needed > (free := free_bytes(self.folder)):
                raise Refused(
                    f"{self.location}: {needed / 2**30:.1f} GiB to bring into {shown_here(self.folder)}, "
                    f"{free / 2**30:.1f} GiB free - {FREE_SPACE_HINT} (SOLLUNE_STORAGE)"
                )
            for _, group in _by_rank(missing):
                self._in_threads(self._bring_file, group)
        self._seen = set(self._local_files())

    def start(self) -> None:
        """Send what changes from now on."""
        self._thread.start()

    def send(self) -> None:
        """Send every file that changed, and delete those that are gone; what names others goes last."""
        with self._lock, folder_lock(self.folder):
            if self._seen and not self.folder.exists():  # nobody deleted a run by clearing a cache
                raise Refused(
                    f"{self.location}: {shown_here(self.folder)} was removed - the same command brings it again"
                )
            rows = {self._name(path): row for path, row in synced_files(self.folder).items()}
            changes = self._changes(rows)
            here = set(self._local_files())
            gone = sorted((self._seen & rows.keys()) - here - {change.name for change in changes}, key=_rank)
            gone = [name for name in gone if not SHARD.fullmatch(name)]  # to make room here, not there
            self._in_threads(self._delete, [name for name in gone if _rank(name)])
            for _, group in _by_rank(change.name for change in changes):
                self._in_threads(self._send_file, [change for change in changes if change.name in group])
            self._in_threads(self._delete, [name for name in gone if not _rank(name)])
            self._seen |= here
        make_room(0)

    def close(self) -> None:
        """Send what is left; raises `Refused` where that fails, with everything still here."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self.send()

    def _changes(self, rows: dict[str, SyncedFile]) -> list[Change]:
        """The files that are not as they were sent; those that name others are read before the rest is listed."""
        changes: dict[str, Change] = {}
        marks = sorted(filter(_rank, self._local_files()), key=_rank, reverse=True)
        for names in (marks, None):
            for name in names if names is not None else self._local_files():
                if name in changes or (names is None and _rank(name)):
                    continue
                path, row = self._path(name), rows.get(name)
                with suppress(FileNotFoundError):  # deleted, or renamed, meanwhile
                    if row is None or not row.is_of(path):
                        now = SyncedFile.of(path, "")
                        changes[name] = Change(name, path.read_bytes() if _rank(name) else None, now)
        return list(changes.values())

    def _send_file(self, change: Change) -> None:
        path = self._path(change.name)
        try:
            stored = self._store.put_whole(self._place(change.name), path if change.content is None else change.content)
        except FileNotFoundError:  # a checkpoint that is not kept any more
            return
        # A log that grew while it was sent keeps its earlier time, and is sent again.
        write_synced(path, change.row._replace(version=stored.version))

    def _delete(self, name: str) -> None:
        self._store.delete(self._place(name))
        forget_synced(self._path(name))
        self._seen.discard(name)

    def _stored_files(self) -> dict[str, StoredObject]:
        """What the location holds; of an unfinished checkpoint nothing."""
        stored = self._store.find(self.location, START_TRIES)
        if not stored and (alone := self._store.info(self.location)):
            return {"": alone}
        for name in stored:
            if any(part in ("", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
                raise Refused(f"{self.location}: holds an object {name!r}, which can name no file here - rename it")
        stored = {name: each for name, each in stored.items() if not _is_hidden(name)}
        return {
            name: each
            for name, each in stored.items()
            if not (match := CHECKPOINT_FILE.fullmatch(name)) or f"{match[1]}state.json" in stored
        }

    def _missing_files(self, stored: dict[str, StoredObject]) -> Iterator[str]:
        """The files to bring; a copy of one that is another there by now, or gone, is removed.

        Raises `Refused` for a file that changed on both sides; nothing has changed then.
        """
        rows = {self._name(path): row for path, row in synced_files(self.folder).items()}
        outdated = []
        for name in sorted(rows.keys() | stored.keys()):
            path, row, there = self._path(name), rows.get(name), stored.get(name)
            if there is not None and row is not None and row.version == there.version:
                continue
            if path.is_file() and not (row is not None and row.is_of(path)):
                if there is not None and not self._is_same(name, there):
                    raise Refused(
                        f"{self.location}/{name}: is another file than {shown_here(path)}, and neither is a copy of "
                        f"the other - remove the one that is wrong, or all of {shown_here(self.folder)} to go on from "
                        "what the location holds"
                    )
            else:
                outdated.append(name)
        for name in outdated:
            self._path(name).unlink(missing_ok=True)
            forget_synced(self._path(name))
        for name, there in stored.items():
            if not self._path(name).is_file():
                if SHARD.fullmatch(name):
                    write_synced(self._path(name), SyncedFile(there.size, ABSENT, there.version))
                else:
                    yield name

    def _is_same(self, name: str, there: StoredObject) -> bool:
        """Whether a file that is here and there has the same content; then it counts as sent."""
        path = self._path(name)
        if path.stat().st_size != there.size:
            return False
        fetched, row = temporary_path(path), SyncedFile.of(path, there.version)
        try:
            self._store.get_whole(self._place(name), fetched)
            if file_sha256(fetched) != file_sha256(path):
                return False
        finally:
            fetched.unlink(missing_ok=True)
        write_synced(path, row)
        return True

    def _bring_file(self, name: str) -> None:
        path = self._path(name)
        with suppress(FileNotFoundError):  # it was deleted there meanwhile
            stored = self._store.get_whole(self._place(name), path)
            write_synced(path, SyncedFile.of(path, stored.version))

    def _local_files(self) -> Iterator[str]:
        """Every finished file here by name, sorted; the folder may be a single file."""
        if self.folder.is_file():
            return iter([""])
        names = []
        for parent, folders, files in os.walk(self.folder, onerror=_raise_unless_gone):
            folders[:] = [folder for folder in folders if not _is_hidden(folder)]
            paths = [Path(parent, file) for file in files if not _is_hidden(file)]
            names += [path.relative_to(self.folder).as_posix() for path in paths if _is_plain_file(path)]
        return iter(sorted(names))

    def _name(self, path: Path) -> str:
        return "" if path == self.folder else path.relative_to(self.folder).as_posix()

    def _path(self, name: str) -> Path:
        return self.folder / name if name else self.folder

    def _place(self, name: str) -> Location:
        return self.location / name if name else self.location

    def _in_threads(self, action: Callable[..., None], items: Iterable[object]) -> None:
        items = list(items)
        if not items:
            return
        with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="storage") as pool:
            list(pool.map(action, items))

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                self.send()
            except Refused as refusal:  # the files are here, and the next round tries again
                if self.problem is None:
                    print(f"storage: {refusal}", file=sys.stderr, flush=True)
                self.problem = refusal
            else:
                self.problem = None


def bring_folder(folder: Path) -> None:
    """Bring what other machines changed in a folder; nothing for a path of this machine."""
    if (location := location_of(folder)) is not None:
        Mirror(location).bring()


def send_folder(folder: Path) -> None:
    """Send now what changed in a folder; nothing for a path of this machine."""
    if (location := location_of(folder)) is not None:
        Mirror(location).send()


def _raise_unless_gone(error: OSError) -> None:
    """A folder may be renamed or deleted while it is listed; one that cannot be read is not empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise Refused(f"{error.filename}: cannot be listed ({error.strerror}) - {hint_for(error)}") from error


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _rank(name: str) -> int:
    """0 for a file that names no other; the higher, the later it is sent."""
    if ENTRY.fullmatch(name):
        return 1
    mark = name.rpartition("/")[2]
    return 1 + len(MARKS) - MARKS.index(mark) if mark in MARKS else 0


def _by_rank(names: Iterable[str]) -> list[tuple[int, list[str]]]:
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(_rank(name), []).append(name)
    return sorted(groups.items())
