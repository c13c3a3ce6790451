"""Which process wrote a file, and whether that process still lives: what a folder shared by several needs to know."""

import hashlib
import os
import socket
from functools import lru_cache
from pathlib import Path


def owner() -> str:
    """This process in a word that fits into a file name: `PID-START@PLACE`."""
    return _word(os.getpid())


def lives(word: str) -> bool | None:
    """Whether the process `word` names still runs; None where that cannot be seen from here, or `word` is no owner."""
    number, _, _ = word.partition("-")
    if not number.isdecimal() or word.rpartition("@")[2] != place():
        return None
    return _start(int(number)) is not None and word == _word(int(number))


def boot() -> str:
    """The id of this host's last start; empty where the system names none."""
    return _read(Path("/proc/sys/kernel/random/boot_id"))


def machine() -> str:
    """The id that this host keeps from one start to the next; empty where the system names none."""
    return _read(Path("/etc/machine-id"))


@lru_cache
def place() -> str:
    """Where process numbers mean the same: a host since its last start, and the container in it."""
    namespace = Path("/proc/self/ns/pid")
    parts = [boot(), str(namespace.readlink()) if namespace.exists() else ""]
    host = "".join(letter for letter in socket.gethostname() if letter.isalnum()) or "host"
    return f"{host}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def _word(pid: int) -> str:
    return f"{pid}-{_start(pid)}@{place()}"


def _start(pid: int) -> str | None:
    """When a process started, so that a number given out again is another process; None when there is none."""
    said = _read(Path(f"/proc/{pid}/stat"))
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
