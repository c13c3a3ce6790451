"""The journal of finished shards: one small file for each, so that any number of processes can write without waiting.

manifest.json is put together from it. An entry appears after its shard has its final name, and never changes unless the
shard is made again. It carries its own sha256, and one that does not match counts as missing.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from configs.values import Stored
from shards.archive import Failure, Shard
from shards.integrity import Damaged, Fault, append_seal, checked_path, read_at_most, repair_hint, seal_fault
from shards.manifest import MAX_BYTES, Manifest
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

JOURNAL_FOLDER = "journal"


class JournalEntry(Stored):
    """One finished shard."""

    recipe_sha256: str
    shard: Shard
    failures: tuple[Failure, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> "JournalEntry":
        """The entry of these bytes; raises `ValueError` unless they are those that `text` gives."""
        if fault := seal_fault(content):
            raise ValueError(fault)
        fields = json.loads(content)
        del fields["sha256"]
        entry = cls.model_validate(fields)
        if entry.text().encode() != content:
            raise ValueError("is not in the form in which it is written")
        return entry

    def text(self) -> str:
        """The content of its file."""
        fields = self.model_dump(mode="json")
        return append_seal("{\n" + "".join(f'"{name}": {json.dumps(value)},\n' for name, value in fields.items()))


class ShardJournal:
    """The entries of a cache folder; a file is read again only when it changes."""

    def __init__(self, cache: Path, recipe_sha256: str) -> None:
        self.folder, self.recipe_sha256 = cache / JOURNAL_FOLDER, recipe_sha256
        self._cached_entries: dict[str, tuple[tuple[int, int, int], JournalEntry | None]] = {}

    def write(self, shard: Shard, failures: tuple[Failure, ...]) -> None:
        """Enter a finished shard, all or nothing."""
        entry = JournalEntry(recipe_sha256=self.recipe_sha256, shard=shard, failures=failures)
        atomic_write(self._path(shard.file), entry.text())

    def forget(self, file: str) -> None:
        """Remove the entry of a shard."""
        self._path(file).unlink(missing_ok=True)

    def entry(self, file: str) -> JournalEntry | None:
        """The entry of one shard, read now; None when it is not finished."""
        try:
            return self._read(self._path(file))
        except FileNotFoundError:
            return None

    def entries(self) -> dict[str, JournalEntry]:
        """Shard's file -> its entry; a shard whose entry is damaged is not finished.

        Raises `Refused` for an entry of another recipe.
        """
        entries: dict[str, tuple[tuple[int, int, int], JournalEntry | None]] = {}
        for path in _listed(self.folder):
            with suppress(FileNotFoundError):  # its shard is made again, or it is brought, this moment
                stat = path.lstat()
                stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                known = self._cached_entries.get(path.name)
                entries[path.name] = known if known and known[0] == stamp else (stamp, self._read(path))
        self._cached_entries = entries
        return {entry.shard.file: entry for _, entry in entries.values() if entry}

    def _read(self, path: Path) -> JournalEntry | None:
        try:
            entry = JournalEntry.parse(read_at_most(path, MAX_BYTES))
        except (ValueError, RecursionError, Damaged):
            return None
        if entry.recipe_sha256 != self.recipe_sha256:
            raise Refused(f"{path}: made by another recipe - choose another run folder (RUN=), or remove this one")
        return entry if self._path(entry.shard.file) == path else None

    def _path(self, file: str) -> Path:
        return self.folder / f"{Path(file).stem}.json"


def entries_of(manifest: Manifest) -> dict[str, JournalEntry]:
    """Path inside the cache -> entry, for each shard of a manifest."""
    recipe = manifest.recipe.fingerprint()
    return {
        f"{JOURNAL_FOLDER}/{Path(shard.file).stem}.json": JournalEntry(
            recipe_sha256=recipe,
            shard=shard,
            failures=tuple(failure for failure in manifest.failures if failure.file == shard.file),
        )
        for shard in manifest.shards
    }


def journal_faults(cache: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each entry that is damaged, missing, or differs from the manifest; a cache may do without a journal."""
    journal = cache / JOURNAL_FOLDER
    if not journal.is_dir() or journal.is_symlink():
        if journal.exists() or journal.is_symlink():
            yield Fault(JOURNAL_FOLDER, "is no folder")
        return
    expected = entries_of(manifest)
    present = {f"{JOURNAL_FOLDER}/{path.name}" for path in journal.iterdir() if not path.name.startswith(".")}
    for file in sorted(expected.keys() | present):
        entry = _read_entry(cache, file)
        if isinstance(entry, str):
            yield Fault(file, entry)
        elif file not in expected:
            yield Fault(file, "the manifest does not know its shard")
        elif changed := [n for n in JournalEntry.model_fields if getattr(entry, n) != getattr(expected[file], n)]:
            yield Fault(file, f"has another {' and '.join(changed)} than the manifest")


def restore_entries(cache: Path, manifest: Manifest) -> list[Path]:
    """Write each missing entry again from the manifest; returns their paths."""
    missing = {cache / file: entry for file, entry in entries_of(manifest).items() if not (cache / file).exists()}
    for path, entry in missing.items():
        atomic_write(path, entry.text())
    return list(missing)


def is_of_schema_1(cache: Path) -> bool:
    """Whether the shards in a journal tell no size, for a cache without a manifest; not where there is no entry."""
    for path in _listed(cache / JOURNAL_FOLDER):
        if isinstance(entry := _read_entry(cache, f"{JOURNAL_FOLDER}/{path.name}"), JournalEntry):
            return entry.shard.size is None
    return False


def broken_entries(cache: Path) -> Iterator[str]:
    """The entries that are damaged in themselves, for a cache without a manifest to compare them with."""
    for path in _listed(cache / JOURNAL_FOLDER):
        is_broken = isinstance(_read_entry(cache, file := f"{JOURNAL_FOLDER}/{path.name}"), str)
        if is_broken and (path.exists() or path.is_symlink()):
            yield file


def _listed(folder: Path) -> list[Path]:
    """The entries that are there now; each may be gone when it is read."""
    try:
        return sorted(folder.glob("*.json"))
    except FileNotFoundError:  # a folder that is removed while it is listed
        return []


def _read_entry(cache: Path, file: str) -> JournalEntry | str:
    """The entry, or what is wrong with it."""
    try:
        return JournalEntry.parse(read_at_most(checked_path(cache, file), MAX_BYTES))
    except ValidationError as error:
        return f"is no entry of a journal ({error.errors(include_url=False)[0]['msg']})"
    except FileNotFoundError:
        return f"missing - {repair_hint(cache)}"
    except (Damaged, ValueError, RecursionError) as error:
        return str(error)
