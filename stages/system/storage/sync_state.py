"""What a working folder and its location had in common last: one row for each file, shared by all processes."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from stages.system.disk import refuse_write_errors
from stages.system.refusal import Refused, in_one_line
from stages.system.storage.locations import storage_folder

STATE_FILE = ".state.sqlite"
LOCK_SECONDS = 60.0
ABSENT, RESERVED = -1, -2
"""In the place of a time: the file is in the store alone, or is being fetched."""
TABLE = "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, version TEXT)"
SENDING_TABLE = "CREATE TABLE IF NOT EXISTS sending (path TEXT PRIMARY KEY, sha256 TEXT)"


class SyncedFile(NamedTuple):
    """A file as it was when it was last the same here and in the store."""

    size: int
    mtime_ns: int
    version: str
    """of the object"""

    @classmethod
    def of(cls, path: Path, version: str) -> "SyncedFile":
        """The file as it is now."""
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, version)

    def is_of(self, path: Path) -> bool:
        """Whether the file has not been written to since; False for none."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


def synced_file(path: Path) -> SyncedFile | None:
    """The row of one file."""
    with open_state() as database:
        row = database.execute("SELECT size, mtime_ns, version FROM files WHERE path = ?", [str(path)]).fetchone()
    return SyncedFile(*row) if row else None


def synced_files(folder: Path) -> dict[Path, SyncedFile]:
    """The rows of all files below a folder, and of itself."""
    below = f"{folder}/"
    with open_state() as database:
        rows = database.execute(
            "SELECT path, size, mtime_ns, version FROM files WHERE path = ? OR substr(path, 1, ?) = ?",
            [str(folder), len(below), below],
        ).fetchall()
    return {Path(path): SyncedFile(*row) for path, *row in rows}


def write_synced(path: Path, row: SyncedFile) -> None:
    """Replace the row of a file."""
    with open_state() as database:
        database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", [str(path), *row])


def note_sending(path: Path, sha256: str) -> None:
    """Remember the content of a file that is about to be sent, in case this process does not learn that it arrived."""
    with open_state(SENDING_TABLE) as database:
        database.execute("INSERT OR REPLACE INTO sending VALUES (?, ?)", [str(path), sha256])


def forget_sending(path: Path) -> None:
    """Forget it: the file's row tells what arrived."""
    with open_state(SENDING_TABLE) as database:
        database.execute("DELETE FROM sending WHERE path = ?", [str(path)])


def sending_of(path: Path) -> str | None:
    """The sha256 of a content that was sent, or was not, and may be that of the object; None for no such one."""
    with open_state(SENDING_TABLE) as database:
        row = database.execute("SELECT sha256 FROM sending WHERE path = ?", [str(path)]).fetchone()
    return str(row[0]) if row else None


def replace_synced(path: Path, expected: SyncedFile | None, row: SyncedFile | None) -> bool:
    """Replace the row of a file, or remove it, unless another thread or process has changed it; whether it was done."""
    with open_state() as database:
        database.execute("BEGIN IMMEDIATE")
        stored = database.execute("SELECT size, mtime_ns, version FROM files WHERE path = ?", [str(path)]).fetchone()
        if (SyncedFile(*stored) if stored else None) != expected:
            return False
        if row is None:
            database.execute("DELETE FROM files WHERE path = ?", [str(path)])
        else:
            database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", [str(path), *row])
    return True


def forget_synced(path: Path) -> None:
    """Remove the row of a file."""
    with open_state() as database:
        database.execute("DELETE FROM files WHERE path = ?", [str(path)])


@contextmanager
def open_state(table: str = TABLE) -> Iterator[sqlite3.Connection]:
    """The database of this machine's working folders with a table, which is created if missing; a transaction.

    Raises `Refused` where it cannot be used.
    """
    file = storage_folder() / STATE_FILE
    with refuse_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as database:
            # What a crash of the machine loses is compared, or fetched, once more.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(table)
            with database:
                yield database
    except sqlite3.Error as error:
        raise Refused(f"{file}: cannot be used ({in_one_line(error)}) - remove it, or free some space") from error
