"""What a process of its own does in a test; it imports nothing large."""

from pathlib import Path

from stages.system.storage.local_copy import hold_copy


def fetch_all(folder: Path, files: list[tuple[str, int]]) -> None:
    """Obtain these files of a working folder, one after the other."""
    for file, size in files:
        hold_copy(folder / file, size)
