"""Records -> shards: each tar appears whole or not at all, and an interrupted cache goes on where it stopped."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from webdataset import TarWriter

from configs.atomic import atomic_path
from configs.refusal import Refused
from shards.archive import places, sha256_of
from shards.codec import encode
from shards.manifest import NAME, Failure, Manifest, Shard
from shards.recipe import Recipe
from shards.record import Record, Split

OWNER = "sollune"


def shard_file(split: Split, index: int) -> str:
    """Where shard number `index` of a split lies inside its cache."""
    return f"data/{split}-{index:06d}.tar"


def write_shard(folder: Path, split: Split, index: int, records: Iterable[Record]) -> Shard:
    """Write one shard, all or nothing; the same records always give the same bytes.

    Raises `Refused` when the disk is full, `ValueError` when the records do not belong into one shard.
    """
    path = folder / shard_file(split, index)
    with atomic_path(path) as temporary:
        shapes = _write_tar(temporary, records)
        if not shapes:
            raise Refused(f"{path}: there is no record to write - see the failures above")
        return _entry(temporary, split, index, shapes)


class CacheWriter:
    """Fills a cache folder shard by shard; one process at a time writes a manifest."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Go on with the cache in `folder`, or begin one; raises `Refused` when it was made by another recipe."""
        self.folder = folder
        self.manifest = Manifest(recipe=recipe)
        if (folder / NAME).exists():
            self.manifest = Manifest.open(folder)
            self.manifest.check_recipe(recipe, folder)
        sweep(folder)

    def has(self, split: Split, index: int, records: int) -> bool:
        """Whether this shard is finished: its bytes are right, and it answers for each of `records` prompts."""
        file = shard_file(split, index)
        shard = next((shard for shard in self.manifest.shards if shard.file == file), None)
        if shard is None:
            return False
        failed = sum(failure.file == file for failure in self.manifest.failures)
        return shard.records + failed == records and shard.fault(self.folder) is None

    def add(
        self, split: Split, index: int, records: Iterable[Record], failures: Sequence[tuple[str, str]] = ()
    ) -> Shard:
        """Write a shard and then enter it into the manifest.

        `failures` are (key, reason) of prompts that gave no record; it is read after the records, which may fill it.
        """
        shard = write_shard(self.folder, split, index, records)
        self.enter(shard, failures)
        return shard

    def enter(self, shard: Shard, failures: Sequence[tuple[str, str]] = ()) -> None:
        """Enter a shard that `write_shard` finished, here or in another process."""
        told = tuple(Failure(file=shard.file, key=key, reason=reason) for key, reason in failures)
        self.manifest = self.manifest.entered(shard, told)
        self.manifest.save(self.folder)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for leftover in [*folder.glob(".*.partial"), *folder.glob("data/.*.partial")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _write_tar(path: Path, records: Iterable[Record]) -> list[tuple[str, int]]:
    """Write the records; returns key and number of draws of each."""
    written: list[tuple[str, int]] = []
    with open(path, "wb") as stream, TarWriter(stream, user=OWNER, group=OWNER, mtime=0, encoder=False) as tar:
        for record in records:
            if written and record.key <= written[-1][0]:
                raise ValueError(f"{path.name}: key {record.key} after {written[-1][0]}: keys must rise")
            if written and len(record.draws) != written[0][1]:
                raise ValueError(
                    f"{path.name}: {record.key} has {len(record.draws)} draws, others have {written[0][1]}"
                )
            json_bytes, st_bytes = encode(record)
            tar.write({"__key__": record.key, "json": json_bytes, "safetensors": st_bytes})
            written.append((record.key, len(record.draws)))
    return written


def _entry(tar: Path, split: Split, index: int, written: Sequence[tuple[str, int]]) -> Shard:
    found = places(tar)
    if list(found) != [key for key, _ in written]:
        raise RuntimeError(f"{tar}: wrote {len(written)} records and found {len(found)}")
    return Shard(
        file=shard_file(split, index),
        split=split,
        records=len(written),
        draws=sum(draws for _, draws in written),
        bytes=tar.stat().st_size,
        sha256=sha256_of(tar),
        first_key=written[0][0],
        last_key=written[-1][0],
        offsets=tuple(found.values()),
    )
