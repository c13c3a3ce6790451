"""Records -> shards: each tar appears whole or not at all, and an interrupted cache goes on where it stopped."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from webdataset import TarWriter

from configs.values import PictureSize
from shards.archive import Failure, Shard, record_spans, sha256_of
from shards.codec import encode
from shards.journal import JournalEntry, ShardJournal, is_of_schema_1
from shards.manifest import MANIFEST_FILE, Manifest, Recipe
from shards.record import LANDINGS_SCHEMA, Record, Split
from stages.system.atomic import PARTIAL_SUFFIX, atomic_path, is_abandoned
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused

TAR_OWNER = "sollune"


def shard_file(split: Split, index: int, size: PictureSize | None = None) -> str:
    """The path of shard number `index` of a split inside its cache; `size` where the cache has several."""
    return f"data/{split}-{index:06d}.tar" if size is None else f"data/{split}-{size}-{index:06d}.tar"


def write_shard(
    folder: Path,
    split: Split,
    index: int,
    records: Iterable[Record],
    before_rename: Callable[[Shard], None] = lambda _: None,
    failures: Sequence[tuple[str, str]] = (),
    size: PictureSize | None = None,
) -> Shard:
    """Write one shard, all or nothing; the same records always give the same bytes.

    `before_rename` is called with the shard when it is whole and has not yet got its name; `failures` are (key,
    reason) of the prompts that gave no record; `size` is given where the cache has several.
    Raises `Refused` when the disk is full, `ValueError` when the records do not belong into one shard.
    """
    path = folder / shard_file(split, index, size)
    with atomic_path(path) as temporary:
        state_counts, stored_size = _write_tar(temporary, records)
        if not state_counts:
            reasons = "; ".join(dict.fromkeys(reason for _, reason in failures)) or "there was no prompt"
            raise Refused(
                f"{path}: none of its {len(failures)} prompts gave a record ({reasons[:300]}) - "
                "mend what the reason names, then run the same command again"
            )
        spans = record_spans(temporary)
        if list(spans) != list(state_counts):
            raise RuntimeError(f"{temporary}: wrote {len(state_counts)} records and read back {len(spans)}")
        shard = Shard(
            file=shard_file(split, index, size),
            split=split,
            size=stored_size,
            records=len(spans),
            draws=sum(state_counts.values()),
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
            first_key=min(spans),
            last_key=max(spans),
            offsets=tuple(spans.values()),
        )
        before_rename(shard)
        return shard


def _write_tar(path: Path, records: Iterable[Record]) -> tuple[dict[str, int], PictureSize | None]:
    """Write the records; returns key -> number of states of each, in order, and the size of their pictures."""
    written, last_key, size, landings = dict[str, int](), "", None, None
    with open(path, "wb") as stream, TarWriter(stream, user=TAR_OWNER, group=TAR_OWNER, mtime=0, encoder=False) as tar:
        for record in records:
            if record.key <= last_key:
                raise ValueError(f"{path.name}: key {record.key} after {last_key}: keys must rise")
            count = len(record.states)
            if written and count != written[last_key]:
                raise ValueError(f"{path.name}: {record.key} has {count} states, others have {written[last_key]}")
            if written and record.size != size:
                raise ValueError(f"{path.name}: {record.key} has size {record.size}, others have {size}")
            times = None if record.landings is None else record.landings.s.tolist()
            if written and times != landings:
                raise ValueError(f"{path.name}: {record.key} has landings at {times}, others have them at {landings}")
            json_bytes, st_bytes = encode(record)
            tar.write({"__key__": record.key, "json": json_bytes, "safetensors": st_bytes})
            written[record.key], last_key, size, landings = count, record.key, record.size, times
    return written, size


class CacheWriter:
    """Fills a cache folder shard by shard; any number of processes may, each with a writer of its own."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Continue the cache in `folder`, or begin one; raises `Refused` when it was made by another recipe.

        A cache that is there goes on in its own schema, whatever the one of `recipe` is.
        """
        refuse_unwritable(folder / MANIFEST_FILE)
        self.folder = folder
        if (folder / MANIFEST_FILE).exists():
            self.manifest = Manifest.open(folder)
            self.manifest.check_recipe(recipe, folder)
            recipe = recipe.in_schema(self.manifest.schema_version)
        else:
            recipe = recipe.in_schema(1 if is_of_schema_1(folder) else recipe.schema_version)
            self.manifest = Manifest(schema_version=recipe.schema_version, recipe=recipe)
        before = self.manifest
        self._journal = ShardJournal(folder, recipe.fingerprint())
        self._known_entries: dict[str, JournalEntry] = {}
        remove_leftovers(folder)
        self.refresh()
        if self.manifest is not before:
            # The journal outlives a manifest that was moved aside, and a process that was killed between the two.
            self.rebuild_manifest()

    def refresh(self) -> None:
        """Read from the journal which shards any process has finished, or forgotten, since."""
        entries = self._journal.entries()
        for file in self._known_entries.keys() - entries.keys():
            self.manifest = self.manifest.without_shard(file)
        for file, entry in entries.items():
            if self._known_entries.get(file) is not entry and self.manifest.size_conflict(entry.shard) is None:
                self.manifest = self.manifest.with_shard(entry.shard, entry.failures)
        self._known_entries = entries

    def is_finished_now(self, split: Split, index: int, records: int, size: PictureSize | None = None) -> bool:
        """`is_finished` by the journal as it is now; changes nothing that another thread may read."""
        entry = self._journal.entry(shard_file(split, index, size))
        complete = entry is not None and entry.shard.records + len(entry.failures) == records
        return bool(entry and complete and entry.shard.size_fault(self.folder) is None)

    def is_finished(self, split: Split, index: int, records: int, size: PictureSize | None = None) -> bool:
        """Whether this shard has a record or a failure for each of `records` prompts, and its file's size is right."""
        shard = self._find_complete(split, index, records, size)
        return shard is not None and shard.size_fault(self.folder) is None

    def is_intact(self, split: Split, index: int, records: int, size: PictureSize | None = None) -> bool:
        """Whether this shard is finished and its bytes are right; reads all of it."""
        shard = self._find_complete(split, index, records, size)
        return shard is not None and shard.fault(self.folder) is None

    def prompt_count(self, split: Split) -> int:
        """The last prompt's number plus one, over the shards of a split; earlier ones may be missing yet."""
        keys = [shard.last_key for shard in self.manifest.shards_of(split)]
        keys += [failure.key for failure in self.manifest.failures if failure.file.startswith(f"data/{split}-")]
        return max((int(key) + 1 for key in keys), default=0)

    def forget(self, split: Split, index: int, size: PictureSize | None = None) -> None:
        """Remove this shard from journal and manifest, so that some process makes it again."""
        file = shard_file(split, index, size)
        if self._find_shard(split, index, size):
            self._journal.forget(file)
            self.manifest = self.manifest.without_shard(file)
            self.rebuild_manifest()

    def forget_damaged(self, split: Split, index: int, size: PictureSize | None = None) -> None:
        """Forget this shard unless its bytes are right."""
        if (shard := self._find_shard(split, index, size)) and shard.fault(self.folder):
            self.forget(split, index, size)

    def add(
        self,
        split: Split,
        index: int,
        records: Iterable[Record],
        failures: Sequence[tuple[str, str]] = (),
        size: PictureSize | None = None,
    ) -> Shard:
        """Write a shard and then enter it into the manifest.

        `size` is given where the cache has several sizes: shards are then numbered for each size, and named by it.
        In a cache of schema 1 the records are stored without their size. Raises `ValueError` for a record with landings
        in a cache without them, or the other way round.
        `failures` are (key, reason) of prompts that gave no record; it is read after the records, which may fill it.
        An older shard of that name is removed from the manifest before the new file takes its place, so that a process
        killed in between leaves a shard to be made, and never a manifest that contradicts the files.
        """

        def forget_older(shard: Shard) -> None:
            self.refresh()
            if (conflict := self.manifest.size_conflict(shard)) is not None:
                raise ValueError(conflict)
            if self._find_shard(split, index, size) not in (None, shard):
                self.forget(split, index, size)

        shard = write_shard(self.folder, split, index, map(self._in_schema, records), forget_older, failures, size)
        self.enter(shard, failures)
        return shard

    def enter(self, shard: Shard, failures: Sequence[tuple[str, str]] = ()) -> None:
        """Enter a shard that `write_shard` finished, here or in another process."""
        self._journal.write(shard, tuple(Failure(file=shard.file, key=key, reason=reason) for key, reason in failures))
        self.rebuild_manifest()

    def rebuild_manifest(self) -> None:
        """Put manifest.json together from the journal.

        Two processes may do so at once, and the slower one may know less: each reads the journal again after writing,
        so the last to write has read every entry.
        """
        self.refresh()
        while True:
            written = self.manifest
            written.save(self.folder)
            self.refresh()
            if self.manifest is written:
                return

    def _in_schema(self, record: Record) -> Record:
        """The record as it is stored in this cache."""
        schema = self.manifest.schema_version
        if (record.landings is not None) != (schema == LANDINGS_SCHEMA):
            raise ValueError(f"record {record.key} is of schema {record.schema}, its cache of schema {schema}")
        return replace(record, size=None) if schema == 1 else record

    def _find_shard(self, split: Split, index: int, size: PictureSize | None) -> Shard | None:
        file = shard_file(split, index, size)
        return next((shard for shard in self.manifest.shards if shard.file == file), None)

    def _find_complete(self, split: Split, index: int, prompts: int, size: PictureSize | None) -> Shard | None:
        shard = self._find_shard(split, index, size)
        failed = sum(failure.file == shard_file(split, index, size) for failure in self.manifest.failures)
        return shard if shard and shard.records + failed == prompts else None


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files of ended processes."""
    for leftover in [*folder.glob(f".*{PARTIAL_SUFFIX}"), *folder.glob(f"*/.*{PARTIAL_SUFFIX}")]:
        if not is_abandoned(leftover):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
