"""Process tokens, which name the process that wrote a file, and claims: one process at a time owns a folder."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.system.disk import unwritable_error
from stages.system.refusal import Refused


def process_token() -> str:
    """This process as a word that fits into a file name: `PID-START@NAMESPACE`."""
    return _token_of(os.getpid())


def is_alive(token: str) -> bool | None:
    """Whether the process of `token` still runs; None where that cannot be seen from here, or `token` is none."""
    pid = token.partition("-")[0]
    if not pid.isdecimal() or token.rpartition("@")[2] != pid_namespace():
        return None
    return _start_time(int(pid)) is not None and token == _token_of(int(pid))


def boot_id() -> str:
    """The id of this host's last boot; empty where the system has none."""
    return _read_or_empty(Path("/proc/sys/kernel/random/boot_id"))


def machine_id() -> str:
    """The id that this host keeps from one boot to the next; empty where the system has none."""
    return _read_or_empty(Path("/etc/machine-id"))


@lru_cache
def pid_namespace() -> str:
    """Within which process ids are unique: a host since its last boot, and the container in it."""
    namespace = Path("/proc/self/ns/pid")
    parts = [boot_id(), str(namespace.readlink()) if namespace.exists() else ""]
    host = "".join(letter for letter in socket.gethostname() if letter.isalnum()) or "host"
    return f"{host}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def _token_of(pid: int) -> str:
    return f"{pid}-{_start_time(pid)}@{pid_namespace()}"


def _start_time(pid: int) -> str | None:
    """When a process started, as a pid is used again; None for no process, "0" where the system does not tell."""
    if stat := _read_or_empty(Path(f"/proc/{pid}/stat")):
        fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks and brackets
        return None if fields[0] in "ZX" else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return "0"


def _read_or_empty(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


CLAIM_FILE = ".claim"


def refuse_claimed(folder: Path, purpose: str) -> None:
    """Raise `Refused`, naming process and host, while another process claims `folder`; nothing changes.

    `purpose` is what this process wants to do there, as in "train in".
    """
    try:
        with open(folder / CLAIM_FILE, encoding="utf-8") as file:
            _refuse_if_alive(file.read(), folder, purpose)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Refused(f"{folder / CLAIM_FILE}: cannot be read ({error.strerror}) - look at its rights") from error


@contextmanager
def claim_folder(folder: Path, purpose: str) -> Iterator[None]:
    """Claim `folder`, which is created if missing, while the block runs; empty folders are removed after it.

    The claim of a dead process is taken over. Raises `Refused` while the owner lives, or cannot be seen from here.
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
    """Write this process into the claim; a lock keeps two processes from taking over the same claim at once."""
    owner = {"owner": process_token(), "process": os.getpid(), "host": socket.gethostname()}
    content = json.dumps({**owner, "machine": machine_id(), "boot": boot_id(), "run": launched_run()})
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            with suppress(OSError):  # a file system without locks: the claim itself still counts
                fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # its owner ended and removed it meanwhile
            file.seek(0)
            _refuse_if_alive(file.read(), folder, purpose)
            file.truncate(0)
            file.write(f"{content}\n")
            file.flush()
            os.fsync(file.fileno())
            return


def _refuse_if_alive(content: str, folder: Path, purpose: str) -> None:
    """Raise `Refused` unless the owner of a claim with this content is dead."""
    if not content.strip():
        return  # its owner died before it was written
    try:
        claim: Mapping[str, Any] = json.loads(content)
        alive, process, host = is_alive(str(claim["owner"])), int(claim["process"]), str(claim["host"])
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{folder / CLAIM_FILE}: cannot be read, so nobody can tell who works in {folder} - remove it if "
            "nobody does"
        ) from error
    if alive:
        raise Refused(
            f"{folder}: process {process} on {host} works here, and one at a time may {purpose} it - "
            f"wait until it is done, stop it (kill {process}), or choose another folder"
        )
    if alive is None and not _has_rebooted(claim) and not _is_of_this_run(claim):
        raise Refused(
            f"{folder}: process {process} on {host} claims it, and whether it still runs cannot be seen from here - "
            f"if it does not, remove {folder / CLAIM_FILE}; or choose another folder"
        )


def _has_rebooted(claim: Mapping[str, Any]) -> bool:
    """Whether the claim is of this machine before its last boot, so that its process has certainly ended."""
    same = claim.get("host") == socket.gethostname() and claim.get("machine") == machine_id() != ""
    return bool(same and claim.get("boot") and boot_id() and claim["boot"] != boot_id())


LAUNCH_VARIABLE = "SOLLUNE_LAUNCH"
"""Environment variable: an id that processes of several machines share whose launcher starts one after another."""


def launched_run() -> str:
    """The id of the launch that this process belongs to, torchrun's or a study's; empty without one, or none given."""
    run = os.environ.get(LAUNCH_VARIABLE) or os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if run == "none" else run


def _is_of_this_run(claim: Mapping[str, Any]) -> bool:
    """Whether the claim is of this launch on another machine, which ends its processes before it goes on."""
    return str(claim.get("run", "")) == launched_run() != ""


def _remove_empty(folders: list[Path]) -> None:
    """Remove the empty ones of the folders, innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
