"""What made these shards, and what each of them should hold."""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError, model_validator

from configs.atomic import atomic_write
from configs.refusal import Refused
from configs.strict import Stored
from shards.damage import Damaged, Fault, read_bounded
from shards.damage import way_out as way_out
from shards.entries import Failure, Part, Shard
from shards.recipe import Recipe as Recipe
from shards.recipe import differences as differences
from shards.record import SCHEMA, Split
from shards.seal import sealed, unsealed

NAME = "manifest.json"
MOST_BYTES = 1 << 26
"""A million records take three quarters of it."""


class Manifest(Stored):
    """The content of manifest.json."""

    schema_version: int = SCHEMA
    recipe: Recipe
    shards: tuple[Shard, ...] = ()
    failures: tuple[Failure, ...] = ()
    table: tuple[Part, ...] = ()
    """the files of the table of these very shards; none when it is not made yet"""

    @model_validator(mode="after")
    def _names_each_file_once(self) -> "Manifest":
        for name in ("shards", "table"):
            files = [one.file for one in getattr(self, name)]
            if files != sorted(set(files)):
                raise ValueError(f"{name} are not in order, or one is there twice")
        return self

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Read the manifest of a cache folder; raises `Refused` when it is missing, broken or of another schema."""
        path = folder / NAME
        try:
            content = read_bounded(path, MOST_BYTES)
        except FileNotFoundError as error:
            raise Refused(f"{path}: not there, so {folder} is no cache - run make cache-teacher") from error
        except OSError as error:
            raise Refused(f"{path}: cannot be read ({error.strerror}) - name a cache or run folder") from error
        return cls.parse(content, folder)

    @classmethod
    def parse(cls, content: bytes, folder: Path) -> "Manifest":
        """The manifest of `folder` from the bytes of its file, which must be the very bytes that `save` wrote."""
        path = folder / NAME
        try:
            said = json.loads(content, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{path}: not good JSON ({error}) - {way_out(folder)}") from error
        version = said.get("schema_version") if isinstance(said, dict) else None
        if version != SCHEMA:
            raise Refused(
                f"{path}: schema_version {version!r:.40}, this program reads {SCHEMA} - make the cache in a new folder"
            )
        fault = unsealed(content)
        said.pop("sha256", None)
        try:
            manifest = cls.model_validate(said)
        except ValidationError as error:
            slip = error.errors(include_url=False)[0]
            where = ascii(".".join(map(str, slip["loc"])))[1:-1]
            raise Damaged(f"{path}: {where:.80}: {slip['msg']} - {way_out(folder)}") from error
        if fault is None and manifest.text().encode() != content:
            fault = "is not in the form in which it is written"
        if fault:
            raise Damaged(f"{path}: {fault} - {way_out(folder)}")
        return manifest

    def text(self) -> str:
        """The content of manifest.json: one line for each shard, and a last one that seals the others."""
        said = self.model_dump(mode="json")
        parts = [f'"schema_version": {said["schema_version"]}', f'"recipe": {json.dumps(said["recipe"], indent=1)}']
        parts += [f'"{name}": {_listed(said[name])}' for name in ("failures", "shards", "table")]
        return sealed("{\n" + ",\n".join(parts) + ",\n")

    def save(self, folder: Path) -> None:
        """Replace manifest.json, all or nothing."""
        atomic_write(folder / NAME, self.text())

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
        if (tuple(shards), tuple(listed)) == (self.shards, self.failures):
            return self  # the table is still the one of these shards
        return self.model_copy(update={"shards": tuple(shards), "failures": tuple(listed), "table": ()})

    def without(self, file: str) -> "Manifest":
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
                    yield Fault(shard.file, fault, shard.spoilt_key(folder))
                elif misplaced := shard.misplaced(folder):
                    yield Fault(shard.file, misplaced)
            except Damaged as damage:
                yield Fault(shard.file, str(damage))
        for part in self.table:
            try:
                if fault := part.fault(folder):
                    yield Fault(part.file, fault)
            except Damaged as damage:
                yield Fault(part.file, str(damage))


def verify(folder: Path) -> Manifest:
    """The manifest of a cache whose every file is what it should be; raises `Damaged` naming the first that is not."""
    manifest = Manifest.open(folder)
    fault = next(manifest.faults(folder), None)
    if fault:
        raise Damaged(f"{fault.told(folder)} - {way_out(folder)}")
    return manifest


def refusal(folder: Path, shard: Shard, fault: str) -> str:
    """The line that tells a user about a bad shard."""
    return f"{Fault(shard.file, fault).told(folder)} - {way_out(folder)}"


def find_cache(folder: Path) -> Path:
    """The cache folder that is meant: `folder` itself, or the one inside it when it is a run folder."""
    inner = folder / "cache"
    return inner if not (folder / NAME).exists() and (inner / NAME).exists() else folder


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _listed(items: list[dict[str, object]]) -> str:
    return "[" + ",".join(f"\n {json.dumps(item)}" for item in items) + ("\n]" if items else "]")
