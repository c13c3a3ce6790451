"""A shard's tar seen from outside: which bytes hold which record, and their sha256."""

import hashlib
import tarfile
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """Where the two members of a record lie in their tar, in bytes."""

    json_offset: int
    json_size: int
    st_offset: int
    st_size: int


def places(tar: Path) -> dict[str, Place]:
    """Key -> place of every record that is whole.

    A tar cut between two members is a good tar to every reader, and shorter: only a count tells.
    """
    size, found, halves = tar.stat().st_size, {}, {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                if member.offset_data + member.size > size:
                    break
                if extension == "json":
                    halves[key] = member
                elif extension == "safetensors" and key in halves:
                    half = halves.pop(key)
                    found[key] = Place(half.offset_data, half.size, member.offset_data, member.size)
    except tarfile.TarError:
        pass  # cut inside a header: what was found before is what is whole
    return found


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
