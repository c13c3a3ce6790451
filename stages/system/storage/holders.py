"""Who holds copies between two uses, and gives them up where another copy needs the room, also that of another process.

Who waits for room holds a lock meanwhile, at which every process that holds copies looks.
"""

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from stages.system.storage.locations import storage_folder

LOCKS_FOLDER = ".locks"
LOOK_SECONDS = 0.2


class Holder(Protocol):
    """What holds copies longer than it reads them; one that is read this moment stays held."""

    def give_up(self, path: Path) -> None:
        """End its hold on a copy."""

    def give_up_half(self) -> None:
        """End its hold on half of its copies, at least on one."""


_holders: "WeakSet[Holder]" = WeakSet()
_lock = threading.Lock()
_watching: set[threading.Thread] = set()
"""The thread that looks; none while nothing is registered."""


def register_holder(holder: Holder) -> None:
    """Have it give up copies from now on."""
    with _lock:
        _holders.add(holder)
        if not any(thread.is_alive() for thread in _watching):  # nor has a forked process one
            _watching.clear()
            _watching.add(thread := threading.Thread(target=_watch, name="room", daemon=True))
            thread.start()


def give_up_copy(path: Path) -> None:
    """End the hold of this process on a copy, unless it is read this moment."""
    for holder in _registered():
        holder.give_up(path)


@contextmanager
def room_wanted() -> Iterator[None]:
    """While the block waits for room, all processes of this machine give up what they hold."""
    with open(_wanted_file(), "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def _registered() -> list[Holder]:
    with _lock:
        return list(_holders)


def _watch() -> None:
    while True:
        threading.Event().wait(LOOK_SECONDS)
        with suppress(OSError):  # no descriptor is free, or the folder is gone
            if _is_room_wanted():
                for holder in _registered():
                    holder.give_up_half()
                    del holder
        with _lock:
            if not _holders:
                _watching.clear()
                return


def _is_room_wanted() -> bool:
    if not _wanted_file().exists():
        return False
    with open(_wanted_file(), "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _wanted_file() -> Path:
    return storage_folder() / LOCKS_FOLDER / "wanted"
