"""What makes a teacher itself: sha256 over exactly the files that are read of it, by component."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from configs.refusal import Refused
from stages.nets.files import PARTS, files_of

COUNTED_BEFORE = {".json", ".txt", ".safetensors"}
"""Recipes used to hold a digest of every file of a part with one of these endings, read or not."""


def identity(folder: Path) -> dict[str, str]:
    """Component -> sha256 over the names and contents of the files that are read, never over the folder's path."""
    return {part: digest(files_of(folder, part)) for part in PARTS}


def as_recorded(before: object, folder: Path) -> dict[str, str]:
    """The identity of a teacher in the words of an earlier recipe, wherever these mean the files that lie here.

    Raises `Refused` where the earlier recipe left out the weights, so that nobody can tell.
    """
    now = identity(folder)
    if not isinstance(before, Mapping):
        return now
    changed = changed_parts(before, folder)
    return {part: sha256 if part in changed else before.get(part, sha256) for part, sha256 in now.items()}


def changed_parts(before: Mapping[str, str], folder: Path) -> list[str]:
    """The parts that are not what a recipe says of them, by today's rule or by the earlier one.

    Raises `Refused` where the earlier rule left out the weights that are read.
    """
    now = identity(folder)
    differing = [part for part, sha256 in before.items() if sha256 != now.get(part)]
    same = [part for part in differing if part in now and before[part] == _digest_before(folder / part)]
    for part in same:
        if left_out := [file for file in files_of(folder, part) if file.suffix not in COUNTED_BEFORE]:
            raise Refused(
                f"teacher: {left_out[0]}: was no part of a teacher's identity when this cache was made, so it may be "
                "another by now - make the cache again in a new run folder"
            )
    return [part for part in differing if part not in same]


def digest(files: Sequence[Path]) -> str:
    """sha256 over the names and contents of files."""
    sha = hashlib.sha256()
    for file in sorted(files):
        state = file.stat()
        sha.update(file.name.encode())
        sha.update(_content(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ino))
    return sha.hexdigest()


def _digest_before(part: Path) -> str:
    return digest([path for path in part.iterdir() if path.suffix in COUNTED_BEFORE and path.is_file()])


@lru_cache(maxsize=256)
def _content(file: Path, _size: int, _mtime_ns: int, _inode: int) -> bytes:
    """sha256 of a file, read once as long as it stays the same: a teacher's weights are gigabytes."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()
