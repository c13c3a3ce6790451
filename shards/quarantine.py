"""Damaged files are moved aside, never deleted, so that what is missing can be made again."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from configs.disk import writing
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
    target = next(cache / FOLDER / f"{i:04d}" for i in count() if not (cache / FOLDER / f"{i:04d}").exists())
    moved = []
    for file in sorted({_in_the_way(cache, file) for file in _damaged(cache)}):
        if (cache / file).exists() or (cache / file).is_symlink():
            with writing(target / file):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (cache / file).rename(target / file)
            moved.append(target / file)
    return moved


def _in_the_way(cache: Path, file: str) -> str:
    """What has to go so that a file can be made again: itself, or what stands where one of its folders should be."""
    for folder in reversed(Path(file).parents[:-1]):
        path = cache / folder
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            return str(folder)
    return file


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
