"""Damaged files are moved aside, never deleted, so that what is missing can be made again."""

from collections.abc import Iterator
from pathlib import Path

from shards.damage import Damaged
from shards.inspection import inspect
from shards.journal import broken_entries
from shards.manifest import NAME, Manifest
from shards.tabulate import NAME as TABLE

FOLDER = "quarantine"


def quarantine(cache: Path) -> list[Path]:
    """Move every damaged file of a cache into a fresh folder under CACHE/quarantine; returns where each of them is now.

    A table goes as a whole. A damaged manifest takes it along: the journal vouches for the shards, not for the table.
    """
    target = next(cache / FOLDER / f"{i:04d}" for i in range(10**4) if not (cache / FOLDER / f"{i:04d}").exists())
    moved = []
    for file in sorted(set(_damaged(cache))):
        if (cache / file).exists() or (cache / file).is_symlink():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).rename(target / file)
            moved.append(target / file)
    return moved


def _damaged(cache: Path) -> Iterator[str]:
    try:
        manifest = Manifest.open(cache)
    except Damaged:
        yield NAME
        yield TABLE
        yield from broken_entries(cache)
        return
    for fault in inspect(cache, manifest):
        yield TABLE if fault.file.startswith(TABLE) else fault.file
