"""What is finished, one small file for each shard: any number of processes can write it without waiting for each other.

manifest.json is put together from it. An entry appears after its shard has its final name, and never changes unless the
shard is made again.
"""

from pathlib import Path

from pydantic import ValidationError

from configs.atomic import atomic_write
from configs.refusal import Refused
from configs.strict import Strict
from shards.manifest import Failure, Shard

NAME = "journal"


class Entry(Strict):
    """One finished shard."""

    recipe_sha256: str
    shard: Shard
    failures: tuple[Failure, ...] = ()


class Journal:
    """The entries of a cache folder; what was read once is read again only when its file changes."""

    def __init__(self, cache: Path, recipe_sha256: str) -> None:
        self.folder, self.recipe_sha256 = cache / NAME, recipe_sha256
        self._known: dict[str, tuple[tuple[int, int, int], Entry | None]] = {}

    def write(self, shard: Shard, failures: tuple[Failure, ...]) -> None:
        """Note a finished shard, all or nothing."""
        entry = Entry(recipe_sha256=self.recipe_sha256, shard=shard, failures=failures)
        atomic_write(self._path(shard.file), entry.model_dump_json() + "\n")

    def forget(self, file: str) -> None:
        """Take back that a shard is finished."""
        self._path(file).unlink(missing_ok=True)

    def entry(self, file: str) -> Entry | None:
        """What is noted of one shard, read this moment; None when it is not finished."""
        try:
            return self._read(self._path(file))
        except FileNotFoundError:
            return None

    def entries(self) -> dict[str, Entry]:
        """Shard's file -> its entry, as far as they are whole: a shard whose entry is damaged is not finished.

        Raises `Refused` for an entry of another recipe.
        """
        found: dict[str, tuple[tuple[int, int, int], Entry | None]] = {}
        for path in sorted(self.folder.glob("*.json")):
            said = path.stat()
            stamp = (said.st_ino, said.st_mtime_ns, said.st_size)
            known = self._known.get(path.name)
            found[path.name] = known if known and known[0] == stamp else (stamp, self._read(path))
        self._known = found
        return {entry.shard.file: entry for _, entry in found.values() if entry}

    def _read(self, path: Path) -> Entry | None:
        try:
            entry = Entry.model_validate_json(path.read_bytes())
        except ValidationError:
            return None
        if entry.recipe_sha256 != self.recipe_sha256:
            raise Refused(f"{path}: made by another recipe - choose another run folder (RUN=), or remove this one")
        return entry if self._path(entry.shard.file) == path else None

    def _path(self, file: str) -> Path:
        return self.folder / f"{Path(file).stem}.json"
