"""What is finished, one small file for each shard: any number of processes can write it without waiting for each other.

manifest.json is put together from it. An entry appears after its shard has its final name, and never changes unless the
shard is made again. It seals itself: one whose bytes are not those that were written is never believed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from configs.values import Stored
from shards.archive import Failure, Shard
from shards.integrity import Damaged, Fault, append_seal, checked_path, read_at_most, seal_fault
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
        """The entry of these bytes; raises `ValueError` unless they are the very ones that `text` gives."""
        fault = seal_fault(content)
        if fault:
            raise ValueError(fault)
        said = json.loads(content)
        del said["sha256"]
        entry = cls.model_validate(said)
        if entry.text().encode() != content:
            raise ValueError("is not in the form in which it is written")
        return entry

    def text(self) -> str:
        """The content of its file."""
        said = self.model_dump(mode="json")
        return append_seal("{\n" + "".join(f'"{name}": {json.dumps(value)},\n' for name, value in said.items()))


class ShardJournal:
    """The entries of a cache folder; what was read once is read again only when its file changes."""

    def __init__(self, cache: Path, recipe_sha256: str) -> None:
        self.folder, self.recipe_sha256 = cache / JOURNAL_FOLDER, recipe_sha256
        self._cached_entries: dict[str, tuple[tuple[int, int, int], JournalEntry | None]] = {}

    def write(self, shard: Shard, failures: tuple[Failure, ...]) -> None:
        """Note a finished shard, all or nothing."""
        entry = JournalEntry(recipe_sha256=self.recipe_sha256, shard=shard, failures=failures)
        atomic_write(self._path(shard.file), entry.text())

    def forget(self, file: str) -> None:
        """Take back that a shard is finished."""
        self._path(file).unlink(missing_ok=True)

    def entry(self, file: str) -> JournalEntry | None:
        """What is noted of one shard, read this moment; None when it is not finished."""
        try:
            return self._read(self._path(file))
        except FileNotFoundError:
            return None

    def entries(self) -> dict[str, JournalEntry]:
        """Shard's file -> its entry, as far as they are whole: a shard whose entry is damaged is not finished.

        Raises `Refused` for an entry of another recipe.
        """
        found: dict[str, tuple[tuple[int, int, int], JournalEntry | None]] = {}
        for path in sorted(self.folder.glob("*.json")):
            said = path.lstat()
            stamp = (said.st_ino, said.st_mtime_ns, said.st_size)
            known = self._cached_entries.get(path.name)
            found[path.name] = known if known and known[0] == stamp else (stamp, self._read(path))
        self._cached_entries = found
        return {entry.shard.file: entry for _, entry in found.values() if entry}

    def _read(self, path: Path) -> JournalEntry | None:
        try:
            entry = JournalEntry.parse(read_at_most(path, MAX_BYTES))
        except (ValueError, RecursionError, Damaged):
            return None
        if entry.recipe_sha256 != self.recipe_sha256:
            raise Refused(f"{path}: made by another recipe - choose another run folder (RUN=), or remove this one")
        return entry if self._path(entry.shard.file) == path else None

    def _path(self, file: str) -> Path:
        return self.folder / entry_file_name(file)


def entry_file_name(shard_file: str) -> str:
    """The name of a shard's entry."""
    return f"{Path(shard_file).stem}.json"


def entries_of(manifest: Manifest) -> dict[str, JournalEntry]:
    """Name of its file -> each entry that belongs to a manifest."""
    recipe = manifest.recipe.fingerprint()
    return {
        entry_file_name(shard.file): JournalEntry(
            recipe_sha256=recipe,
            shard=shard,
            failures=tuple(failure for failure in manifest.failures if failure.file == shard.file),
        )
        for shard in manifest.shards
    }


def journal_faults(cache: Path, manifest: Manifest) -> Iterator[Fault]:
    """Each entry that is damaged, missing, or says otherwise than the manifest; a cache may do without a journal."""
    if not (cache / JOURNAL_FOLDER).exists() and not (cache / JOURNAL_FOLDER).is_symlink():
        return
    if not (cache / JOURNAL_FOLDER).is_dir() or (cache / JOURNAL_FOLDER).is_symlink():
        yield Fault(JOURNAL_FOLDER, "is no folder")
        return
    wanted = entries_of(manifest)
    found = {path.name for path in (cache / JOURNAL_FOLDER).iterdir() if not path.name.startswith(".")}
    for name in sorted(wanted.keys() | found):
        fault = _entry_fault(cache, f"{JOURNAL_FOLDER}/{name}", wanted.get(name))
        if fault:
            yield Fault(f"{JOURNAL_FOLDER}/{name}", fault)


def restore_entries(cache: Path, manifest: Manifest) -> list[Path]:
    """Write each missing entry again, as the manifest knows it; returns where they lie."""
    missing = {cache / JOURNAL_FOLDER / name: entry for name, entry in entries_of(manifest).items()}
    missing = {path: entry for path, entry in missing.items() if not path.exists()}
    for path, entry in missing.items():
        atomic_write(path, entry.text())
    return list(missing)


def broken_entries(cache: Path) -> Iterator[str]:
    """The entries that are damaged in themselves: all that can be told where there is no manifest to compare with."""
    for path in sorted((cache / JOURNAL_FOLDER).glob("*.json")):
        if isinstance(_read_entry(cache, f"{JOURNAL_FOLDER}/{path.name}"), str):
            yield f"{JOURNAL_FOLDER}/{path.name}"


def _entry_fault(cache: Path, file: str, wanted: JournalEntry | None) -> str | None:
    entry = _read_entry(cache, file)
    if isinstance(entry, str):
        return entry
    if wanted is None:
        return "the manifest does not know its shard"
    slips = [name for name in JournalEntry.model_fields if getattr(entry, name) != getattr(wanted, name)]
    return f"says another {' and '.join(slips)} than the manifest" if slips else None


def _read_entry(cache: Path, file: str) -> JournalEntry | str:
    """The entry, or what is wrong with it."""
    try:
        return JournalEntry.parse(read_at_most(checked_path(cache, file), MAX_BYTES))
    except ValidationError as error:
        return f"is no entry of a journal ({error.errors(include_url=False)[0]['msg']})"
    except (Damaged, ValueError, RecursionError) as error:
        return str(error)
