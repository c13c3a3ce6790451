"""What a process of its own does in a test; it imports nothing large."""

from multiprocessing.synchronize import Event
from pathlib import Path

from stages.system.storage.holders import register_holder
from stages.system.storage.local_copy import Hold, hold_copy


def fetch_all(folder: Path, files: list[tuple[str, int]]) -> None:
    """Obtain these files of a working folder, one after the other."""
    for file, size in files:
        hold_copy(folder / file, size)


class HeldCopies:
    """Holds copies until they are wanted."""

    def __init__(self, holds: list[Hold | None]) -> None:
        self.holds = holds

    def give_up(self, path: Path) -> None:
        """End the hold on one."""
        self.holds = [hold for hold in self.holds if hold is None or hold.path != path]

    def give_up_half(self) -> None:
        """End the hold on the first half."""
        del self.holds[: -(-len(self.holds) // 2)]


def hold_all(folder: Path, files: list[tuple[str, int]], held: Event, ended: Event) -> None:
    """Hold these files of a working folder, which are here, until another process wants the room or `ended` is set."""
    held_copies = HeldCopies([hold_copy(folder / file, size) for file, size in files])
    register_holder(held_copies)
    held.set()
    ended.wait(60)
