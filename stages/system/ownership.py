"""Which process wrote a file, and whether that process still lives: what a folder shared by several needs to know.

One process at a time writes into a folder: its claim names it, and counts for as long as it lives.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from stages.system.disk import unwritable_error
from stages.system.refusal import Refused


def process_token() -> str:
    """This process in a word that fits into a file name: `PID-START@PLACE`."""
    return _token_of(os.getpid())


def is_alive(token: str) -> bool | None:
    """Whether the process `word` names still runs; None where that cannot be seen from here, or `word` is no owner."""
    number, _, _ = token.partition("-")
    if not number.isdecimal() or token.rpartition("@")[2] != pid_namespace():
        return None
    return _start_time(int(number)) is not None and token == _token_of(int(number))


def boot_id() -> str:
    """The id of this host's last start; empty where the system names none."""
    return _read_or_empty(Path("/proc/sys/kernel/random/boot_id"))


def machine_id() -> str:
    """The id that this host keeps from one start to the next; empty where the system names none."""
    return _read_or_empty(Path("/etc/machine-id"))


@lru_cache
def pid_namespace() -> str:
    """Where process numbers mean the same: a host since its last start, and the container in it."""
    namespace = Path("/proc/self/ns/pid")
    parts = [boot_id(), str(namespace.readlink()) if namespace.exists() else ""]
    host = "".join(letter for letter in socket.gethostname() if letter.isalnum()) or "host"
    return f"{host}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def _token_of(pid: int) -> str:
    return f"{pid}-{_start_time(pid)}@{pid_namespace()}"


def _start_time(pid: int) -> str | None:
    """When a process started, so that a number given out again is another process; None when there is none."""
    said = _read_or_empty(Path(f"/proc/{pid}/stat"))
    if said:
        fields = said.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
        return None if fields[0] in "ZX" else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "0"


def _read_or_empty(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


CLAIM_FILE = ".claim"


def refuse_claimed(folder: Path, purpose: str) -> None:
    """Raise `Refused`, naming process and host, while another process works in `folder`; nothing changes.

    `purpose` is what this process wants there, as in "train in".
    """
    try:
        with open(folder / CLAIM_FILE, encoding="utf-8") as file:
            _refuse_if_alive(file, folder, purpose)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Refused(f"{folder / CLAIM_FILE}: cannot be read ({error.strerror}) - look at its rights") from error


@contextmanager
def claim_folder(folder: Path, purpose: str) -> Iterator[None]:
    """Claim `folder`, which is made if it is missing, for as long as the block runs.

    The claim of a dead process is taken over. Raises `Refused` while a living one holds it, or one that cannot be seen
    from here; what was made is removed again when the block leaves nothing in it.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    path = folder / CLAIM_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_claim(path, folder, purpose)
    except OSError as error:
        _remove_empty(missing)
        raise unwritable_error(folder, error) from error
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8"))["owner"] == process_token():
                path.unlink()
        _remove_empty(missing)


def _write_claim(path: Path, folder: Path, purpose: str) -> None:
    """Write this process into the claim; a lock keeps two from finding the same dead owner at the same moment."""
    content = json.dumps(
        {
            "owner": process_token(),
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": machine_id(),
            "boot": boot_id(),
        }
    )
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            with suppress(OSError):  # a disk without locks: the claim itself still counts
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # its owner ended and took it away meanwhile
            file.seek(0)
            _refuse_if_alive(file, folder, purpose)
            file.truncate(0)
            file.write(f"{content}\n")
            file.flush()
            os.fsync(file.fileno())
            return


def _refuse_if_alive(file: IO[str], folder: Path, purpose: str) -> None:
    text = file.read()
    if not text.strip():
        return  # whoever began to write it died before it was done
    try:
        said: Mapping[str, Any] = json.loads(text)
        word, process, host = str(said["owner"]), int(said["process"]), str(said["host"])
        alive = is_alive(word)
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{folder / CLAIM_FILE}: cannot be read, so nobody can tell who works in {folder} - remove it if "
            "nobody does"
        ) from error
    if alive is None and _has_rebooted(said):
        return
    if alive:
        raise Refused(
            f"{folder}: process {process} on {host} works here, and one at a time may {purpose} it - "
            f"wait until it is done, stop it (kill {process}), or choose another folder"
        )
    if alive is None:
        raise Refused(
            f"{folder}: process {process} on {host} claims it, and whether it still runs cannot be seen from here - "
            f"if it does not, remove {folder / CLAIM_FILE}; or choose another folder"
        )


def _has_rebooted(claim: Mapping[str, Any]) -> bool:
    """Whether the claim is of this very machine before its last start, so that its process is gone for certain."""
    same = claim.get("host") == socket.gethostname() and claim.get("machine") == machine_id() != ""
    return bool(same and claim.get("boot") and boot_id() and claim["boot"] != boot_id())


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, innermost first, that hold nothing."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
