"""Records -> shards: each tar appears whole or not at all, and an interrupted cache goes on where it stopped."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from webdataset import TarWriter

from shards.archive import Failure, Shard, record_spans, sha256_of
from shards.codec import encode
from shards.journal import JournalEntry, ShardJournal
from shards.manifest import MANIFEST_FILE, Manifest, Recipe
from shards.record import Record, Split
from stages.system.atomic import PARTIAL_SUFFIX, atomic_path, is_abandoned
from stages.system.disk import refuse_unwritable
from stages.system.refusal import Refused

TAR_OWNER = "sollune"


def shard_file(split: Split, index: int) -> str:
    """Where shard number `index` of a split lies inside its cache."""
    return f"data/{split}-{index:06d}.tar"


def write_shard(
    folder: Path,
    split: Split,
    index: int,
    records: Iterable[Record],
    before_rename: Callable[[Shard], None] = lambda _: None,
    failures: Sequence[tuple[str, str]] = (),
) -> Shard:
    """Write one shard, all or nothing; the same records always give the same bytes.

    `before` is told of the shard when it is whole and has not yet got its name; `failures` are the reasons of the
    prompts that gave no record.
    Raises `Refused` when the disk is full, `ValueError` when the records do not belong into one shard.
    """
    path = folder / shard_file(split, index)
    with atomic_path(path) as temporary:
        shapes = _write_tar(temporary, records)
        if not shapes:
            why = "; ".join(dict.fromkeys(reason for _, reason in failures)) or "there was no prompt"
            raise Refused(
                f"{path}: none of its {len(failures)} prompts gave a record ({why[:300]}) - "
                "mend what the reason names, then run the same command again"
            )
        shard = _describe_shard(temporary, split, index, shapes)
        before_rename(shard)
        return shard


class CacheWriter:
    """Fills a cache folder shard by shard; any number of processes may, each with a writer of its own."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Go on with the cache in `folder`, or begin one; raises `Refused` when it was made by another recipe."""
        refuse_unwritable(folder / MANIFEST_FILE)
        self.folder = folder
        self.manifest = Manifest(recipe=recipe)
        if (folder / MANIFEST_FILE).exists():
            self.manifest = Manifest.open(folder)
            self.manifest.check_recipe(recipe, folder)
        said = self.manifest
        self._journal = ShardJournal(folder, recipe.fingerprint())
        self._known_entries: dict[str, JournalEntry] = {}
        remove_leftovers(folder)
        self.refresh()
        if self.manifest is not said:
            # The journal outlives a manifest that was moved aside, and a process that was killed between the two.
            self.rebuild_manifest()

    def refresh(self) -> None:
        """Learn what other processes have finished, or found to be unfinished, since."""
        entries = self._journal.entries()
        for file in self._known_entries.keys() - entries.keys():
            self.manifest = self.manifest.without_shard(file)
        for file, entry in entries.items():
            if self._known_entries.get(file) is not entry:
                self.manifest = self.manifest.with_shard(entry.shard, entry.failures)
        self._known_entries = entries

    def is_finished_now(self, split: Split, index: int, records: int) -> bool:
        """The same as `finished`, looked up this moment; it touches nothing that another thread of ours may change."""
        entry = self._journal.entry(shard_file(split, index))
        return bool(
            entry
            and entry.shard.records + len(entry.failures) == records
            and entry.shard.size_fault(self.folder) is None
        )

    def is_finished(self, split: Split, index: int, records: int) -> bool:
        """Whether this shard answers for each of `records` prompts, as far as its size tells; see `refresh`."""
        shard = self._find_shard(split, index)
        return bool(shard and self._answered_prompts(shard) == records and shard.size_fault(self.folder) is None)

    def is_intact(self, split: Split, index: int, records: int) -> bool:
        """Whether this shard is finished: its bytes are right, and it answers for each of `records` prompts."""
        shard = self._find_shard(split, index)
        return bool(shard and self._answered_prompts(shard) == records and shard.fault(self.folder) is None)

    def prompt_count(self, split: Split) -> int:
        """How many prompts of a split this cache is for, as far as its shards tell; some before may be missing yet."""
        keys = [shard.last_key for shard in self.manifest.shards_of(split)]
        keys += [one.key for one in self.manifest.failures if one.file.startswith(f"data/{split}-")]
        return max((int(key) + 1 for key in keys), default=0)

    def forget(self, split: Split, index: int) -> None:
        """Make every process know that this shard is to be made (again)."""
        file = shard_file(split, index)
        if self._find_shard(split, index):
            self._journal.forget(file)
            self.manifest = self.manifest.without_shard(file)
            self.rebuild_manifest()

    def forget_damaged(self, split: Split, index: int) -> None:
        """Forget this shard unless its bytes are right."""
        shard = self._find_shard(split, index)
        if shard and shard.fault(self.folder):
            self.forget(split, index)

    def add(
        self, split: Split, index: int, records: Iterable[Record], failures: Sequence[tuple[str, str]] = ()
    ) -> Shard:
        """Write a shard and then enter it into the manifest.

        `failures` are (key, reason) of prompts that gave no record; it is read after the records, which may fill it.
        A shorter shard of that name stays listed until the new one takes its place. In between, neither is listed: a
        process killed there leaves a shard to be made, and never a manifest that says something else than the files.
        """

        def retire(shard: Shard) -> None:
            self.refresh()
            if self._find_shard(split, index) not in (None, shard):
                self.forget(split, index)

        shard = write_shard(self.folder, split, index, records, retire, failures)
        self.enter(shard, failures)
        return shard

    def enter(self, shard: Shard, failures: Sequence[tuple[str, str]] = ()) -> None:
        """Enter a shard that `write_shard` finished, here or in another process."""
        told = tuple(Failure(file=shard.file, key=key, reason=reason) for key, reason in failures)
        self._journal.write(shard, told)
        self.rebuild_manifest()

    def rebuild_manifest(self) -> None:
        """Put manifest.json together from the journal.

        Two processes may do so at once, and the slower one may know less: whoever wrote looks into the journal again,
        so the last to write has seen every entry.
        """
        self.refresh()
        while True:
            written = self.manifest
            written.save(self.folder)
            self.refresh()
            if self.manifest is written:
                return

    def _find_shard(self, split: Split, index: int) -> Shard | None:
        file = shard_file(split, index)
        return next((shard for shard in self.manifest.shards if shard.file == file), None)

    def _answered_prompts(self, shard: Shard) -> int:
        return shard.records + sum(failure.file == shard.file for failure in self.manifest.failures)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written, and nothing that a living one is writing."""
    for leftover in [*folder.glob(f".*{PARTIAL_SUFFIX}"), *folder.glob(f"*/.*{PARTIAL_SUFFIX}")]:
        if not is_abandoned(leftover):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write_tar(path: Path, records: Iterable[Record]) -> list[tuple[str, int]]:
    """Write the records; returns key and number of draws of each."""
    written: list[tuple[str, int]] = []
    with open(path, "wb") as stream, TarWriter(stream, user=TAR_OWNER, group=TAR_OWNER, mtime=0, encoder=False) as tar:
        for record in records:
            if written and record.key <= written[-1][0]:
                raise ValueError(f"{path.name}: key {record.key} after {written[-1][0]}: keys must rise")
            if written and len(record.states) != written[0][1]:
                raise ValueError(
                    f"{path.name}: {record.key} has {len(record.states)} draws, others have {written[0][1]}"
                )
            json_bytes, st_bytes = encode(record)
            tar.write({"__key__": record.key, "json": json_bytes, "safetensors": st_bytes})
            written.append((record.key, len(record.states)))
    return written


def _describe_shard(tar: Path, split: Split, index: int, written: Sequence[tuple[str, int]]) -> Shard:
    found = record_spans(tar)
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
