"""One process at a time writes into a folder: its claim names it, and counts for as long as it lives."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from configs.disk import unwritable
from configs.owner import boot, lives, machine, owner
from configs.refusal import Refused

NAME = ".claim"


def refuse_claimed(folder: Path, purpose: str) -> None:
    """Raise `Refused`, naming process and host, while another process works in `folder`; nothing changes.

    `purpose` is what this process wants there, as in "train in".
    """
    try:
        with open(folder / NAME, encoding="utf-8") as file:
            _refuse_living(file, folder, purpose)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Refused(f"{folder / NAME}: cannot be read ({error.strerror}) - look at its rights") from error


@contextmanager
def claimed(folder: Path, purpose: str) -> Iterator[None]:
    """Claim `folder`, which is made if it is missing, for as long as the block runs.

    The claim of a dead process is taken over. Raises `Refused` while a living one holds it, or one that cannot be seen
    from here; what was made is removed again when the block leaves nothing in it.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, folder, purpose)
    except OSError as error:
        _remove_empty(missing)
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8"))["owner"] == owner():
                path.unlink()
        _remove_empty(missing)


def _take(path: Path, folder: Path, purpose: str) -> None:
    """Write this process into the claim; a lock keeps two from finding the same dead owner at the same moment."""
    content = json.dumps(
        {"owner": owner(), "process": os.getpid(), "host": socket.gethostname(), "machine": machine(), "boot": boot()}
    )
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            with suppress(OSError):  # a disk without locks: the claim itself still counts
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # its owner ended and took it away meanwhile
            file.seek(0)
            _refuse_living(file, folder, purpose)
            file.truncate(0)
            file.write(f"{content}\n")
            file.flush()
            os.fsync(file.fileno())
            return


def _refuse_living(file: IO[str], folder: Path, purpose: str) -> None:
    text = file.read()
    if not text.strip():
        return  # whoever began to write it died before it was done
    try:
        said: Mapping[str, Any] = json.loads(text)
        word, process, host = str(said["owner"]), int(said["process"]), str(said["host"])
        alive = lives(word)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{folder / NAME}: cannot be read, so nobody can tell who works in {folder} - remove it if nobody does"
        ) from error
    if alive is None and _began_again(said):
        return
    if alive:
        raise Refused(
            f"{folder}: process {process} on {host} works here, and one at a time may {purpose} it - "
            f"wait until it is done, stop it (kill {process}), or choose another folder"
        )
    if alive is None:
        raise Refused(
            f"{folder}: process {process} on {host} claims it, and whether it still runs cannot be seen from here - "
            f"if it does not, remove {folder / NAME}; or choose another folder"
        )


def _began_again(said: Mapping[str, Any]) -> bool:
    """Whether the claim is of this very machine before its last start, so that its process is gone for certain."""
    same = said.get("host") == socket.gethostname() and said.get("machine") == machine() != ""
    return bool(same and said.get("boot") and boot() and said["boot"] != boot())


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, innermost first, that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
