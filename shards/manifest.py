"""What decides the bytes of a cache, and how two such decisions differ.

What made these shards, and what each of them should hold.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, JsonValue, ValidationError, model_validator

from configs.values import Stored
from shards.archive import Failure, Shard, TableEntry
from shards.integrity import Damaged, Fault, append_seal, read_at_most, repair_hint, seal_fault
from shards.record import SCHEMA, Split
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

MAX_SHOWN_CHARACTERS = 40


class Recipe(Stored):
    """What made a cache: `identity` decides its bytes, `information` (versions, where things lay) does not."""

    schema_version: int = SCHEMA
    identity: dict[str, JsonValue]
    information: dict[str, JsonValue] = Field(default_factory=dict)

    def fingerprint(self) -> str:
        """sha256 over everything that decides the bytes, in hex."""
        counts: JsonValue = {"schema_version": self.schema_version, "identity": self.identity}
        return hashlib.sha256(_canonical(counts).encode()).hexdigest()

    def flat_identity(self) -> dict[str, str]:
        """Dotted name -> value, for each single thing that counts."""
        return {"schema_version": str(self.schema_version), **dict(_flatten("", self.identity))}


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Each dotted field that counts and is not the same in both, with its value in `a` (was) and in `b` (is now)."""
    before, now = a.flat_identity(), b.flat_identity()
    return [
        f"{name} was {_shorten(before.get(name))}, is now {_shorten(now.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _flatten(name: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _flatten(f"{name}.{key}" if name else key, inner)
    else:
        yield name, _canonical(value)


def _canonical(value: JsonValue) -> str:
    """One text for one value: 5 and 5.0, or true and 1, are different things to whoever reads them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _shorten(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[:16]}..."


MANIFEST_FILE = "manifest.json"
MAX_BYTES = 1 << 26
"""A million records take three quarters of it."""


class Manifest(Stored):
    """The content of manifest.json."""

    schema_version: int = SCHEMA
    recipe: Recipe
    shards: tuple[Shard, ...] = ()
    failures: tuple[Failure, ...] = ()
    table: tuple[TableEntry, ...] = ()
    """the files of the table of these very shards; none when it is not made yet"""

    @model_validator(mode="after")
    def _check_file_order(self) -> "Manifest":
        for name in ("shards", "table"):
            files = [one.file for one in getattr(self, name)]
            if files != sorted(set(files)):
                raise ValueError(f"{name} are not in order, or one is there twice")
        return self

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Read the manifest of a cache folder; raises `Refused` when it is missing, broken or of another schema."""
        path = folder / MANIFEST_FILE
        try:
            content = read_at_most(path, MAX_BYTES)
        except FileNotFoundError as error:
            raise Refused(f"{path}: not there, so {folder} is no cache - run make cache-teacher") from error
        except OSError as error:
            raise Refused(f"{path}: cannot be read ({error.strerror}) - name a cache or run folder") from error
        return cls.parse(content, folder)

    @classmethod
    def parse(cls, content: bytes, folder: Path) -> "Manifest":
        """The manifest of `folder` from the bytes of its file, which must be the very bytes that `save` wrote."""
        path = folder / MANIFEST_FILE
        try:
            said = json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{path}: not good JSON ({error}) - {repair_hint(folder)}") from error
        version = said.get("schema_version") if isinstance(said, dict) else None
        if version != SCHEMA:
            raise Refused(
                f"{path}: schema_version {version!r:.40}, this program reads {SCHEMA} - make the cache in a new folder"
            )
        fault = seal_fault(content)
        said.pop("sha256", None)
        try:
            manifest = cls.model_validate(said)
        except ValidationError as error:
            slip = error.errors(include_url=False)[0]
            where = ascii(".".join(map(str, slip["loc"])))[1:-1]
            raise Damaged(f"{path}: {where:.80}: {slip['msg']} - {repair_hint(folder)}") from error
        if fault is None and manifest.text().encode() != content:
            fault = "is not in the form in which it is written"
        if fault:
            raise Damaged(f"{path}: {fault} - {repair_hint(folder)}")
        return manifest

    def text(self) -> str:
        """The content of manifest.json: one line for each shard, and a last one that seals the others."""
        said = self.model_dump(mode="json")
        parts = [f'"schema_version": {said["schema_version"]}', f'"recipe": {json.dumps(said["recipe"], indent=1)}']
        parts += [f'"{name}": {_json_lines(said[name])}' for name in ("failures", "shards", "table")]
        return append_seal("{\n" + ",\n".join(parts) + ",\n")

    def save(self, folder: Path) -> None:
        """Replace manifest.json, all or nothing."""
        atomic_write(folder / MANIFEST_FILE, self.text())

    def shards_of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def with_shard(self, shard: Shard, failures: tuple[Failure, ...] = ()) -> "Manifest":
        """This manifest with `shard` in its place, which depends on its name and not on when it was made."""
        shards = sorted(
            [other for other in self.shards if other.file != shard.file] + [shard], key=lambda one: one.file
        )
        others = [failure for failure in self.failures if failure.file != shard.file]
        listed = sorted([*others, *failures], key=lambda one: (one.file, one.key))
        if (tuple(shards), tuple(listed)) == (self.shards, self.failures):
            return self  # the table is still the one of these shards
        return self.model_copy(update={"shards": tuple(shards), "failures": tuple(listed), "table": ()})

    def without_shard(self, file: str) -> "Manifest":
        """This manifest as if this shard had never been made."""
        shards = tuple(shard for shard in self.shards if shard.file != file)
        failures = tuple(one for one in self.failures if one.file != file)
        return self.model_copy(update={"shards": shards, "failures": failures, "table": ()})

    def check_recipe(self, recipe: Recipe, cache: Path | str = "cache") -> None:
        """Raise `Refused`, naming each field that differs, unless `recipe` would make these very shards."""
        if self.recipe.fingerprint() != recipe.fingerprint():
            slips = "; ".join(differences(self.recipe, recipe))
            raise Refused(
                f"{cache}: made by another recipe: {slips} - choose another run folder (RUN=), or remove this one"
            )

    def faults(self, folder: Path) -> Iterator[Fault]:
        """What is wrong with each file that is not what the manifest says; reads every byte."""
        for shard in self.shards:
            try:
                fault = shard.fault(folder)
                if fault:
                    yield Fault(shard.file, fault, shard.first_damaged_key(folder))
                elif misplaced := shard.offsets_fault(folder):
                    yield Fault(shard.file, misplaced)
            except Damaged as damage:
                yield Fault(shard.file, str(damage))
        for part in self.table:
            try:
                if fault := part.fault(folder):
                    yield Fault(part.file, fault)
            except Damaged as damage:
                yield Fault(part.file, str(damage))


def open_verified(folder: Path) -> Manifest:
    """The manifest of a cache whose every file is what it should be; raises `Damaged` naming the first that is not."""
    manifest = Manifest.open(folder)
    fault = next(manifest.faults(folder), None)
    if fault:
        raise Damaged(f"{fault.message(folder)} - {repair_hint(folder)}")
    return manifest


def fault_message(folder: Path, shard: Shard, fault: str) -> str:
    """The line that tells a user about a bad shard."""
    return f"{Fault(shard.file, fault).message(folder)} - {repair_hint(folder)}"


def find_cache(folder: Path) -> Path:
    """The cache folder that is meant: `folder` itself, or the one inside it when it is a run folder."""
    inner = folder / "cache"
    return inner if not (folder / MANIFEST_FILE).exists() and (inner / MANIFEST_FILE).exists() else folder


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _json_lines(items: list[dict[str, object]]) -> str:
    return "[" + ",".join(f"\n {json.dumps(item)}" for item in items) + ("\n]" if items else "]")
