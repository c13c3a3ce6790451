"""The files of a working folder by name: which are hidden, and which name others and so are sent after them."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

MARKS = ("COMPLETE", "state.json", "manifest.json", "model_index.json", "origin.json")
"""Files that name others, or mean that they are whole: what is first is sent last."""
ENTRY = re.compile(r"(.*/)?journal/[^/]+\.json")
CHECKPOINT_FILE = re.compile(r"(.*checkpoints/[0-9]+/)[^/]+")


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden: it stays here."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def mark_of(name: str) -> str | None:
    """The file that is last of the checkpoint to which a file belongs; None for any other."""
    return f"{match[1]}state.json" if (match := CHECKPOINT_FILE.fullmatch(name)) else None


def rank(name: str) -> int:
    """0 for a file that names no other; the higher, the later it is sent."""
    if ENTRY.fullmatch(name):
        return 1
    mark = name.rpartition("/")[2]
    return 1 + len(MARKS) - MARKS.index(mark) if mark in MARKS else 0


def by_rank(names: Iterable[str]) -> list[tuple[int, list[str]]]:
    """The names by their rank, the lowest first."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(rank(name), []).append(name)
    return sorted(groups.items())
