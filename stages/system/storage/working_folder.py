"""The files of a working folder and of its location: listed, compared, and brought from there."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from stages.system.atomic import temporary_path
from stages.system.disk import FREE_SPACE_HINT, file_sha256, free_bytes, hint_for
from stages.system.refusal import Refused
from stages.system.storage.local_copy import SHARD, Hold, fetch_synced, folder_lock, lock_file
from stages.system.storage.locations import Location, shown_here
from stages.system.storage.names import by_rank, is_hidden, mark_of
from stages.system.storage.object_store import ObjectStore, StoredObject
from stages.system.storage.sync_state import (
    ABSENT,
    RESERVED,
    SyncedFile,
    forget_sending,
    forget_synced,
    replace_synced,
    sending_of,
    synced_file,
    synced_files,
    write_synced,
)

THREADS = 8
START_TRIES = 4


class WorkingFolder:
    """A folder of this machine, or a single file, and the location that it stands for."""

    def __init__(self, location: Location, store: ObjectStore) -> None:
        self.location, self.folder, self._store = location, location.folder, store

    def bring(self, *, again: bool = True) -> None:
        """Make the working folder what the location holds, but for shards and what is newer here.

        What was removed here is brought `again`, unless a running command removed it, and it is to be deleted there.
        Raises `Refused` for a file that changed on both sides, and where the disk is too small.
        """
        with folder_lock(self.folder):
            rows = self._rows()  # before the listing: of what another thread sends meanwhile the row has changed then
            stored = self._stored_files()
            missing = [name for name in self._missing_files(rows, stored) if again or name not in rows]
            needed = sum(stored[name].size for name in missing)
            if needed > (free := free_bytes(self.folder)):
                raise Refused(
                    f"{self.location}: {needed / 2**30:.1f} GiB to bring into {shown_here(self.folder)}, "
                    f"{free / 2**30:.1f} GiB free - {FREE_SPACE_HINT} (SOLLUNE_STORAGE)"
                )
            for _, group in by_rank(missing):
                self._in_threads(self._bring_file, group)

    def _stored_files(self) -> dict[str, StoredObject]:
        """What the location holds."""
        stored = self._store.find(self.location, START_TRIES)
        if not stored and (alone := self._store.info(self.location)):
            return {"": alone}
        for name in stored:
            if any(part in ("", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
                raise Refused(f"{self.location}: holds an object {name!r}, which can name no file here - rename it")
        return {name: each for name, each in stored.items() if not is_hidden(name)}

    def _missing_files(self, rows: dict[str, SyncedFile], stored: dict[str, StoredObject]) -> Iterator[str]:
        """The files to bring; a copy of one that is another there by now, or gone, is removed.

        An unfinished checkpoint there counts as none, but one that is being sent from here stays as it is.
        Raises `Refused` for a file that changed on both sides; nothing has changed then.
        """
        outdated = []
        for name in sorted(rows.keys() | stored.keys()):
            path, row, there = self._path(name), rows.get(name), stored.get(name)
            if (mark := mark_of(name)) and mark not in stored:
                there = stored.pop(name, None)
                if self._is_unsent(mark, rows):
                    if row is not None and (there is None or row.version != there.version):
                        replace_synced(path, row, None)  # it is sent again
                    continue
                there = None
            if there is not None and row is not None and row.version == there.version:
                continue
            if row is not None and row.mtime_ns == RESERVED and not Hold(path).lock_at_once():
                stored.pop(name, None)  # it is being fetched
            elif self._is_unsent(name, rows):
                if there is not None and self._is_conflict(name, row, there):
                    raise Refused(
                        f"{self.location}/{name}: is another file than {shown_here(path)}, and neither is a copy of "
                        f"the other - remove the one that is wrong, or all of {shown_here(self.folder)} to go on from "
                        "what the location holds"
                    )
            elif row is not None:
                outdated.append(name)
        for name in outdated:
            path, row = self._path(name), rows.pop(name)
            with self._lock_of(name):
                if synced_file(path) == row and (row.is_of(path) or not path.exists()):
                    path.unlink(missing_ok=True)
                    forget_synced(path)
        for name, there in stored.items():
            if not self._path(name).is_file():
                if SHARD.fullmatch(name):
                    absent = SyncedFile(there.size, ABSENT, there.version)
                    replace_synced(self._path(name), rows.get(name), absent)  # unless it was fetched meanwhile
                else:
                    yield name

    def _is_unsent(self, name: str, rows: dict[str, SyncedFile]) -> bool:
        """Whether a file is here, and not as it was sent, or brought."""
        path, row = self._path(name), rows.get(name)
        return path.is_file() and not (row is not None and row.is_of(path))

    def _is_conflict(self, name: str, row: SyncedFile | None, there: StoredObject) -> bool:
        """Whether a file is another there than here, and was not sent, fetched or removed here in this moment."""
        with self._lock_of(name):
            if synced_file(self._path(name)) != row:
                return False
            try:
                return not self._is_same(name, there)
            except FileNotFoundError:
                return False

    def _is_same(self, name: str, there: StoredObject) -> bool:
        """Whether a file that is here and there has the same content; then it counts as sent.

        So does what was sent when the process ended before it learned that it arrived; the file here is newer then.
        """
        path = self._path(name)
        here, sent = SyncedFile.of(path, there.version), sending_of(path)
        if here.size != there.size and sent is None:
            return False
        fetched = temporary_path(path.with_name(lock_file(path).name))
        try:
            self._store.get_whole(self._place(name), fetched)
            sha256 = file_sha256(fetched)
        finally:
            fetched.unlink(missing_ok=True)
        if sha256 == file_sha256(path):
            write_synced(path, here)
        elif sha256 == sent:
            write_synced(path, SyncedFile(there.size, 0, there.version))
        else:
            return False
        forget_sending(path)
        return True

    def _bring_file(self, name: str) -> None:
        with self._lock_of(name), suppress(FileNotFoundError):  # it was deleted there meanwhile
            fetch_synced(self._store, self._place(name), self._path(name))

    def _local_files(self) -> Iterator[str]:
        """Every finished file here by name, sorted; the folder may be a single file."""
        if self.folder.is_file():
            return iter([""])
        names = []
        for parent, folders, files in os.walk(self.folder, onerror=_raise_unless_gone):
            folders[:] = [folder for folder in folders if not is_hidden(folder)]
            paths = [Path(parent, file) for file in files if not is_hidden(file)]
            names += [path.relative_to(self.folder).as_posix() for path in paths if _is_plain_file(path)]
        return iter(sorted(names))

    def _lock_of(self, name: str) -> AbstractContextManager[None]:
        """Held while a file is sent or brought: whoever decides about it meets file, row and object together."""
        path = self._path(name)
        return folder_lock(path.with_name(f".{path.name}.send"))

    def _rows(self) -> dict[str, SyncedFile]:
        return {self._name(path): row for path, row in synced_files(self.folder).items()}

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


def _raise_unless_gone(error: OSError) -> None:
    """A folder may be renamed or deleted while it is listed; one that cannot be read is not empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise Refused(f"{error.filename}: cannot be listed ({error.strerror}) - {hint_for(error)}") from error


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
