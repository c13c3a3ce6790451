"""manifest.json: the recipe that made a cache, and what each of its files should hold."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, JsonValue, ValidationError, model_validator

from configs.values import PictureSize, Stored
from shards.archive import Failure, Shard, TableEntry
from shards.codec import schemas_text
from shards.integrity import Damaged, Fault, append_seal, read_at_most, repair_hint, seal_fault
from shards.record import LANDINGS_SCHEMA, SCHEMA, SCHEMAS, Split
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused

MAX_SHOWN_CHARACTERS = 40


class Recipe(Stored):
    """What made a cache: `identity` decides its bytes, `information` (versions, paths) does not."""

    schema_version: int = SCHEMA
    identity: dict[str, JsonValue]
    information: dict[str, JsonValue] = Field(default_factory=dict)

    def fingerprint(self) -> str:
        """sha256 over everything that decides the bytes, in hex."""
        hashed: JsonValue = {"schema_version": self.schema_version, "identity": self.identity}
        return hashlib.sha256(_canonical(hashed).encode()).hexdigest()

    def flat_identity(self) -> dict[str, str]:
        """Dotted name -> value of each field of the identity."""
        return dict(_flatten("", self.identity))

    def in_schema(self, version: int) -> "Recipe":
        """The same recipe for records of another schema."""
        return self if version == self.schema_version else self.model_copy(update={"schema_version": version})


def differences(a: Recipe, b: Recipe) -> list[str]:
    """A text for each dotted field of the identity that differs, with its value in `a` (was) and in `b` (is now).

    The schema is no part of it: it says how records are stored, not which.
    """
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
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _flatten(f"{name}.{number}", inner)
    else:
        yield name, _canonical(value)


def _canonical(value: JsonValue) -> str:
    """One text for one value; 5 and 5.0, or true and 1, have different ones."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _shorten(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= MAX_SHOWN_CHARACTERS else f"{value[:16]}..."


MANIFEST_FILE = "manifest.json"
MAX_BYTES = 1 << 26
"""A million records take three quarters of it."""


class Totals(NamedTuple):
    """Sums over the shards of a split."""

    shards: int
    records: int
    states: int
    bytes: int


class Manifest(Stored):
    """The content of manifest.json."""

    schema_version: int = SCHEMA
    recipe: Recipe
    shards: tuple[Shard, ...] = ()
    failures: tuple[Failure, ...] = ()
    table: tuple[TableEntry, ...] = ()
    """the files of the table of these shards; none when it is not made yet"""

    @model_validator(mode="after")
    def _check_file_order(self) -> "Manifest":
        for name in ("shards", "table"):
            files = [entry.file for entry in getattr(self, name)]
            if files != sorted(set(files)):
                raise ValueError(f"{name} are not in order, or one is there twice")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> "Manifest":
        if self.recipe.schema_version != self.schema_version:
            raise ValueError(f"schema {self.schema_version} with a recipe of schema {self.recipe.schema_version}")
        if (fault := next(filter(None, map(self.size_conflict, self.shards)), None)) is not None:
            raise ValueError(fault)
        return self

    def size_conflict(self, shard: Shard) -> str | None:
        """Why a shard cannot be one of this cache, as far as its size tells.

        All shards have the size in their names, or else all have one size.
        """
        if (shard.size is None) != (self.schema_version == 1):
            return f"{shard.file}: its size is {shard.size}, in schema {self.schema_version}"
        first = next((other for other in self.shards if other.file != shard.file), shard)
        if (first.size_in_name is None) != (shard.size_in_name is None):
            return f"{shard.file} and {first.file} are named in two ways"
        if shard.size_in_name is None and first.size != shard.size:
            return f"{shard.file} has size {shard.size}, {first.file} has {first.size}, and neither name tells it"
        return None

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
        """The manifest of `folder` from the bytes of its file, which must be those that `save` wrote."""
        path = folder / MANIFEST_FILE
        try:
            content_json = json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{path}: not good JSON ({error}) - {repair_hint(folder)}") from error
        version = content_json.get("schema_version") if isinstance(content_json, dict) else None
        if type(version) is not int or version not in SCHEMAS:
            raise Refused(
                f"{path}: schema_version {version!r:.40}, this program reads {schemas_text()} - "
                "make the cache in a new folder, or read it with a newer version of this program"
            )
        content_json.pop("sha256", None)
        try:
            manifest = cls.model_validate(content_json)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ascii(".".join(map(str, first["loc"])))[1:-1]
            raise Damaged(f"{path}: {where:.80}: {first['msg']} - {repair_hint(folder)}") from error
        fault = seal_fault(content)
        if fault is None and manifest.text().encode() != content:
            fault = "is not in the form in which it is written"
        if fault:
            raise Damaged(f"{path}: {fault} - {repair_hint(folder)}")
        return manifest

    def text(self) -> str:
        """The content of manifest.json: one line for each shard, and a last one that seals the others."""
        fields = self.model_dump(mode="json")
        parts = [f'"schema_version": {fields["schema_version"]}', f'"recipe": {json.dumps(fields["recipe"], indent=1)}']
        for name in ("failures", "shards", "table"):
            lines = ",".join(f"\n {json.dumps(entry)}" for entry in fields[name])
            parts.append(f'"{name}": [{lines}' + ("\n]" if lines else "]"))
        return append_seal("{\n" + ",\n".join(parts) + ",\n")

    def save(self, folder: Path) -> None:
        """Replace manifest.json, all or nothing."""
        atomic_write(folder / MANIFEST_FILE, self.text())

    def shards_of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def totals(self, split: Split, size: PictureSize | None = None) -> Totals:
        """What one split holds, or of it the shards of one size."""
        shards = tuple(shard for shard in self.shards_of(split) if size in (None, shard.size))
        counts = ((shard.records, shard.draws, shard.bytes) for shard in shards)
        return Totals(len(shards), *map(sum, zip(*counts, strict=True))) if shards else Totals(0, 0, 0, 0)

    def sizes_of(self, split: Split | None = None) -> tuple[PictureSize | None, ...]:
        """The picture sizes of one split or of all, each once, by width and height; (None,) in schema 1."""
        sizes = {shard.size for shard in self.shards if split in (None, shard.split)}
        return tuple(sorted(sizes, key=lambda size: (size.width, size.height) if size else (0, 0)))

    def with_shard(self, shard: Shard, failures: tuple[Failure, ...] = ()) -> "Manifest":
        """This manifest with `shard` in the place of its name, and without a table unless nothing changes."""
        others = self.without_shard(shard.file)
        shards = tuple(sorted([*others.shards, shard], key=lambda entry: entry.file))
        listed = tuple(sorted([*others.failures, *failures], key=lambda failure: (failure.file, failure.key)))
        if (shards, listed) == (self.shards, self.failures):
            return self
        return others.model_copy(update={"shards": shards, "failures": listed})

    def without_shard(self, file: str) -> "Manifest":
        """This manifest without a shard and its failures, and without a table."""
        shards = tuple(shard for shard in self.shards if shard.file != file)
        failures = tuple(failure for failure in self.failures if failure.file != file)
        return self.model_copy(update={"shards": shards, "failures": failures, "table": ()})

    def check_recipe(self, recipe: Recipe, cache: Path | str = "cache") -> None:
        """Raise `Refused`, naming each field that differs, unless `recipe` would make these records, in any schema."""
        if self.recipe.fingerprint() != recipe.in_schema(self.schema_version).fingerprint():
            changes = "; ".join(differences(self.recipe, recipe))
            raise Refused(
                f"{cache}: made by another recipe: {changes} - choose another run folder (RUN=), or remove this one"
            )

    def refuse_without_landings(self, folder: Path) -> None:
        """Raise `Refused` unless the records of this cache have landings."""
        if self.schema_version != LANDINGS_SCHEMA:
            raise Refused(
                f"{folder}: schema {self.schema_version}, whose records have no landings, and windows need them "
                f"(schema {LANDINGS_SCHEMA}) - make the cache in a new run folder with --render.states.windows 4, "
                "or train by the identity alone with --fast.identity-share 1"
            )

    def faults(self, folder: Path) -> Iterator[Fault]:
        """What is wrong with each file that is not what the manifest says; reads every byte."""
        entries: tuple[Shard | TableEntry, ...] = (*self.shards, *self.table)
        for entry in entries:
            try:
                if fault := entry.fault(folder):
                    yield Fault(
                        entry.file, fault, entry.first_damaged_key(folder) if isinstance(entry, Shard) else None
                    )
                elif isinstance(entry, Shard) and (fault := entry.offsets_fault(folder)):
                    yield Fault(entry.file, fault)
            except Damaged as damage:
                yield Fault(entry.file, str(damage))


def fault_message(folder: Path, shard: Shard, fault: str) -> str:
    """The line for the user about a damaged shard."""
    return f"{Fault(shard.file, fault).message(folder)} - {repair_hint(folder)}"


def find_cache(folder: Path) -> Path:
    """`folder` itself, or the cache inside it when it is a run folder, also where the manifest is lost."""
    inner = folder / "cache"
    return inner if not (folder / MANIFEST_FILE).exists() and inner.is_dir() else folder


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")
