"""What several tests check of a cache on the disk."""

from pathlib import Path

from shards.integrity import Damaged, repair_hint
from shards.manifest import Manifest


def open_verified(folder: Path) -> Manifest:
    """The manifest of a cache whose every file is what it should be; raises `Damaged` naming the first that is not."""
    manifest = Manifest.open(folder)
    fault = next(manifest.faults(folder), None)
    if fault:
        raise Damaged(f"{fault.message(folder)} - {repair_hint(folder)}")
    return manifest
