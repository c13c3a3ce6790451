"""What the manifest says of each file: a tar of records, a prompt that gave none, a file of the table."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from configs.strict import Stored
from shards.archive import Place, places, sha256_of, spoilt, tar_bytes
from shards.codec import MOST_JSON_BYTES
from shards.damage import inside
from shards.layout import LEAST_DRAW_BYTES, MOST_RECORD_BYTES
from shards.record import Split

Count = Annotated[int, Field(ge=1, lt=1 << 48)]
Key = Annotated[str, Field(pattern=r"^[0-9]{9}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardFile = Annotated[str, Field(pattern=r"^data/(train|validation)-[0-9]{6}\.tar$")]
TableFile = Annotated[str, Field(pattern=r"^table\.zarr/([a-z0-9_]+/)*(zarr\.json|[0-9]+)$")]


class Shard(Stored):
    """One tar of the cache, as it was when it was finished; all its records have the same number of draws."""

    file: ShardFile
    """path inside the cache folder: these names and no others, so that none leads out of it"""
    split: Split
    records: Count
    draws: Count
    bytes: Count
    sha256: Sha256
    first_key: Key
    last_key: Key
    offsets: tuple[Place, ...]
    """where each record lies, in bytes, in the order of the tar"""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Shard":
        if not self.file.startswith(f"data/{self.split}-"):
            raise ValueError(f"{self.file} is not of split {self.split}")
        if self.draws % self.records or len(self.offsets) != self.records or self.last_key < self.first_key:
            raise ValueError(f"{self.file}: its counts do not agree")
        end = 0
        for place in self.offsets:
            gap = place.st_offset - place.json_offset - place.json_size
            if place.first != end or not 512 <= gap < 1024 or min(place.json_size, place.st_size) < 1:
                raise ValueError(f"{self.file}: places a record at byte {place.json_offset}, where none can lie")
            if place.json_size > MOST_JSON_BYTES or place.st_size > MOST_RECORD_BYTES:
                raise ValueError(f"{self.file}: places a record of {place.st_size} bytes at byte {place.json_offset}")
            if self.draws_per_record * LEAST_DRAW_BYTES > place.st_size:
                raise ValueError(f"{self.file}: {self.draws_per_record} draws in a record of {place.st_size} bytes")
            end = place.last
        if self.bytes != tar_bytes(end):
            raise ValueError(f"{self.file}: its records end at byte {end} of {self.bytes}")
        return self

    @property
    def draws_per_record(self) -> int:
        """K of every record in this shard."""
        return self.draws // self.records

    def fault_at_a_glance(self, folder: Path) -> str | None:
        """What is wrong, as far as the file's size tells."""
        path = folder / self.file
        if not path.is_file() and not path.is_symlink():
            return "missing"
        inside(folder, self.file)
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

    def spoilt_key(self, folder: Path) -> str | None:
        """The key of the first record of a damaged tar that is not what it was, where that can be told."""
        if not (folder / self.file).is_file():
            return None
        number = spoilt(folder / self.file, self.offsets)
        if number is None:
            return None
        gapless = int(self.last_key) - int(self.first_key) + 1 == self.records
        name = f"{int(self.first_key) + number:09d}" if gapless else f"number {number}"
        return f"{name} at byte {self.offsets[number].json_offset}"

    def misplaced(self, folder: Path) -> str | None:
        """What the manifest says wrongly about a tar whose content is right."""
        found = places(folder / self.file)
        if len(found) != self.records or len(self.offsets) != self.records:
            return f"{len(found)} records, manifest says {self.records} and places {len(self.offsets)}"
        if (min(found), max(found)) != (self.first_key, self.last_key) or tuple(found.values()) != self.offsets:
            return "its records lie elsewhere than the manifest says"
        return None


class Failure(Stored):
    """A prompt that could not be rendered, and why: it is told, never silently left out."""

    file: ShardFile
    """the shard that should hold it"""
    key: Key
    reason: str


class Part(Stored):
    """One file of the table as it was written."""

    file: TableFile
    bytes: Count
    sha256: Sha256

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the file; reads all of it."""
        if not (folder / self.file).exists() and not (folder / self.file).is_symlink():
            return "missing"
        path = inside(folder, self.file)
        if path.stat().st_size != self.bytes:
            return f"{path.stat().st_size} bytes, manifest says {self.bytes}"
        found = sha256_of(path)
        return None if found == self.sha256 else f"sha256 {found[:12]}..., manifest says {self.sha256[:12]}..."
