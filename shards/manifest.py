"""What made these shards, and what each of them should hold."""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from configs.atomic import atomic_write
from configs.refusal import Refused
from configs.strict import Strict
from shards.archive import Place, places, sha256_of
from shards.recipe import Recipe as Recipe
from shards.recipe import differences as differences
from shards.record import SCHEMA, Split

NAME = "manifest.json"


class Shard(Strict):
    """One tar of the cache, as it was when it was finished; all its records have the same number of draws."""

    file: str
    """path inside the cache folder"""
    split: Split
    records: int
    draws: int
    bytes: int
    sha256: str
    first_key: str
    last_key: str
    offsets: tuple[Place, ...]
    """where each record lies, in bytes, in the order of the tar"""

    @property
    def draws_per_record(self) -> int:
        """K of every record in this shard."""
        return self.draws // self.records

    def fault_at_a_glance(self, folder: Path) -> str | None:
        """What is wrong, as far as the file's size tells."""
        path = folder / self.file
        if not path.is_file():
            return "missing"
        if path.stat().st_size == self.bytes:
            return None
        found = len(places(path))
        if found != self.records:
            return f"{found} records, manifest says {self.records}"
        return f"{path.stat().st_size} bytes, manifest says {self.bytes}"

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the file's content; reads all of it."""
        glance = self.fault_at_a_glance(folder)
        if glance:
            return glance
        found = sha256_of(folder / self.file)
        return None if found == self.sha256 else f"sha256 {found[:12]}..., manifest says {self.sha256[:12]}..."

    def misplaced(self, folder: Path) -> str | None:
        """What the manifest says wrongly about a tar whose content is right."""
        found = places(folder / self.file)
        if len(found) != self.records or len(self.offsets) != self.records:
            return f"{len(found)} records, manifest says {self.records} and places {len(self.offsets)}"
        if (min(found), max(found)) != (self.first_key, self.last_key) or tuple(found.values()) != self.offsets:
            return "its records lie elsewhere than the manifest says"
        return None


class Failure(Strict):
    """A prompt that could not be rendered, and why: it is told, never silently left out."""

    file: str
    """the shard that should hold it"""
    key: str
    reason: str


class Manifest(Strict):
    """The content of manifest.json."""

    schema_version: int = SCHEMA
    recipe: Recipe
    shards: tuple[Shard, ...] = ()
    failures: tuple[Failure, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Read the manifest of a cache folder; raises `Refused` when it is missing, broken or of another schema."""
        path = folder / NAME
        try:
            said = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise Refused(f"{path}: not there, so {folder} is no cache - run make cache-teacher") from error
        except OSError as error:
            raise Refused(f"{path}: cannot be read ({error.strerror}) - name a cache or run folder") from error
        except ValueError as error:
            raise Refused(f"{path}: not good JSON ({error}) - {way_out(folder)}") from error
        version = said.get("schema_version") if isinstance(said, dict) else None
        if version != SCHEMA:
            raise Refused(
                f"{path}: schema_version {version}, this program reads {SCHEMA} - make the cache in a new folder"
            )
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            slip = error.errors(include_url=False)[0]
            where = ".".join(map(str, slip["loc"]))
            raise Refused(f"{path}: {where}: {slip['msg']} - {way_out(folder)}") from error

    def save(self, folder: Path) -> None:
        """Replace manifest.json, all or nothing; the text has one line for each shard."""
        said = self.model_dump(mode="json")
        parts = [f'"schema_version": {said["schema_version"]}', f'"recipe": {json.dumps(said["recipe"], indent=1)}']
        parts += [f'"{name}": {_listed(said[name])}' for name in ("failures", "shards")]
        atomic_write(folder / NAME, "{\n" + ",\n".join(parts) + "\n}\n")

    def of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def entered(self, shard: Shard, failures: tuple[Failure, ...] = ()) -> "Manifest":
        """This manifest with `shard` in its place, which depends on its name and not on when it was made."""
        shards = sorted(
            [other for other in self.shards if other.file != shard.file] + [shard], key=lambda one: one.file
        )
        others = [failure for failure in self.failures if failure.file != shard.file]
        listed = sorted([*others, *failures], key=lambda one: (one.file, one.key))
        return self.model_copy(update={"shards": tuple(shards), "failures": tuple(listed)})

    def without(self, file: str) -> "Manifest":
        """This manifest as if this shard had never been made."""
        shards = tuple(shard for shard in self.shards if shard.file != file)
        return self.model_copy(
            update={"shards": shards, "failures": tuple(one for one in self.failures if one.file != file)}
        )

    def check_recipe(self, recipe: Recipe, cache: Path | str = "cache") -> None:
        """Raise `Refused`, naming each field that differs, unless `recipe` would make these very shards."""
        if self.recipe.fingerprint() != recipe.fingerprint():
            slips = "; ".join(differences(self.recipe, recipe))
            raise Refused(
                f"{cache}: made by another recipe: {slips} - choose another run folder (RUN=), or remove this one"
            )

    def faults(self, folder: Path) -> Iterator[str]:
        """What is wrong with each shard that is not what the manifest says; reads every byte."""
        for shard in self.shards:
            fault = shard.fault(folder) or shard.misplaced(folder)
            if fault:
                yield refusal(folder, shard, fault)


def verify(folder: Path) -> Manifest:
    """The manifest of a cache whose every shard is what it should be; raises `Refused` naming the first that is not."""
    manifest = Manifest.open(folder)
    fault = next(manifest.faults(folder), None)
    if fault:
        raise Refused(fault)
    return manifest


def refusal(folder: Path, shard: Shard, fault: str) -> str:
    """The line that tells a user about a bad shard."""
    return f"shard {folder / shard.file}: {fault} - {way_out(folder)}: it alone is remade"


def way_out(folder: Path) -> str:
    """How to mend a cache: make asks for nothing while the mark of completion stands."""
    return f"remove {folder / 'COMPLETE'} and run make cache-teacher again"


def find_cache(folder: Path) -> Path:
    """The cache folder that is meant: `folder` itself, or the one inside it when it is a run folder."""
    inner = folder / "cache"
    return inner if not (folder / NAME).exists() and (inner / NAME).exists() else folder


def _listed(items: list[dict[str, object]]) -> str:
    return "[" + ",".join(f"\n {json.dumps(item)}" for item in items) + ("\n]" if items else "]")
