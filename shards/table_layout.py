"""The table's own description of itself, judged before zarr believes it: known names, sizes and codecs only."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shards.damage import Damaged, inside, read_bounded, way_out
from shards.manifest import Manifest, Part

MOST_BYTES = 1 << 24
MOST_CHUNK_ROWS, MOST_CHUNK_VALUES = 1 << 16, 1 << 27
CODECS = {"sharding_indexed", "bytes", "zstd", "crc32c"}


def check_files(folder: Path, parts: Iterable[Part]) -> None:
    """Raise `Damaged` with the first of these files that is not what the manifest says."""
    for part in parts:
        fault = part.fault(folder)
        if fault:
            raise Damaged(f"{folder / part.file}: {fault} - {way_out(folder)}")


def check_layout(folder: Path, manifest: Manifest) -> None:
    """Check the whole table's descriptions, and that no file lies there that the manifest does not name."""
    named = {part.file for part in manifest.table}
    for path in (folder / "table.zarr").rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and str(path.relative_to(folder)) not in named:
            raise Damaged(f"{path}: is not in the manifest - {way_out(folder)}")
    described = [part for part in manifest.table if part.file.endswith("zarr.json")]
    check_files(folder, described)
    rows = sum(shard.draws for shard in manifest.shards)
    for part in described:
        path = inside(folder, part.file)
        try:
            said = json.loads(read_bounded(path, MOST_BYTES))
            slip = _slip(said, rows) if said["node_type"] == "array" else None
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise Damaged(f"{path}: describes no array ({error!r:.80}) - {way_out(folder)}") from error
        if slip:
            raise Damaged(f"{path}: {slip} - {way_out(folder)}")


def _slip(said: dict[str, Any], rows: int) -> str | None:
    """What is wrong with an array's description."""
    unknown = set(_codecs(said["codecs"])) - CODECS
    if unknown or said.get("storage_transformers"):
        return f"asks for codecs that are not believed ({', '.join(sorted(map(str, unknown)))})"
    shape, chunk = said["shape"], said["chunk_grid"]["configuration"]["chunk_shape"]
    if said["zarr_format"] != 3 or shape[0] != rows or not 1 <= len(shape) <= 2 or len(chunk) != len(shape):
        return f"has shape {shape}, the shards have {rows} draws"
    values = 1
    for size in chunk:
        values *= size
    if not 1 <= chunk[0] <= MOST_CHUNK_ROWS or shape[1:] != chunk[1:] or not 1 <= values <= MOST_CHUNK_VALUES:
        return f"has chunks of shape {chunk}"
    return None


def _codecs(listed: list[dict[str, Any]]) -> list[str]:
    """Every codec that is named, also inside another one."""
    names = []
    for codec in listed:
        names.append(codec["name"])
        inner = codec.get("configuration", {})
        names += _codecs(inner.get("codecs", [])) + _codecs(inner.get("index_codecs", []))
    return names
