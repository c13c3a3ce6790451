"""Locations in an object store, such as s3://BUCKET/FOLDER, and the folder of this machine in which each is worked on.

The working folder follows from the location alone, and keeps the relations between folders: a run's cache lies beside
it here as it does there. Everything below works on plain files in it; `mirror` keeps both sides the same.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.system.refusal import invalid_character_reason

FOLDER_VARIABLE, BYTES_VARIABLE = "SOLLUNE_STORAGE", "SOLLUNE_STORAGE_BYTES"
ALIASES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
"""Each scheme of an object store, and its usual name."""
ENDPOINT_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "s3": ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("FSSPEC_GCS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"),
    "hf": ("HF_ENDPOINT",),
}
"""Where a store of another address is named: its working folders are others, too."""
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
HALF_URL = re.compile(rf"({'|'.join([*ALIASES, 'file'])}):", re.IGNORECASE)
HALF_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)", re.DOTALL)
MAX_NAME_BYTES = 255
EXAMPLES = "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, hf://datasets/ORG/NAME or file:///FOLDER"


@dataclass(frozen=True)
class Location:
    """A folder, or a file, in an object store."""

    scheme: str
    key: str
    """BUCKET/FOLDER, without slashes at its ends"""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> "Location":
        return Location(self.scheme, f"{self.key}/{name}")

    @property
    def bucket(self) -> str:
        """The first part of its name."""
        return self.key.partition("/")[0]

    @property
    def folder(self) -> Path:
        """Its working folder on this machine."""
        return storage_folder() / store_name(self.scheme) / self.key

    def holds(self, other: "Location") -> bool:
        """Whether `other` is this location, or lies in it."""
        return self.scheme == other.scheme and f"{other.key}/".startswith(f"{self.key}/")


def storage_folder() -> Path:
    """The folder of all working folders: SOLLUNE_STORAGE, or sollune/storage in the user's cache folder."""
    return _storage_folder(os.environ.get(FOLDER_VARIABLE), os.environ.get("XDG_CACHE_HOME"))


@lru_cache
def _storage_folder(named: str | None, cache_home: str | None) -> Path:
    folder = Path(named) if named else Path(cache_home or Path.home() / ".cache") / "sollune" / "storage"
    return Path(os.path.realpath(folder.expanduser()))  # a path that is resolved later still lies in it


def parse_location(text: str) -> Location | Path | None:
    """The location that a text names, or the local path of a file:// one; None for a path of this machine.

    Raises `ValueError` for what begins like a location and names none.
    """
    url = URL.fullmatch(text)
    if url is None:
        if HALF_URL.match(text):
            raise ValueError(f"is no location - write {EXAMPLES}")
        return None
    scheme, rest = url[1].lower(), url[2]
    if scheme == "file":
        path = rest.removeprefix("localhost")
        if not path.startswith("/"):
            raise ValueError("names no absolute path - write file:///FOLDER, with three slashes")
        return Path(path)
    if scheme not in ALIASES:
        raise ValueError(f"{url[1]}:// is no storage that is known here - write {EXAMPLES}")
    key = rest.strip("/")
    parts = key.split("/")
    if fault := invalid_character_reason(key):
        raise ValueError(f"a name {fault} - rename it")
    if any(letter in key for letter in "\n\r\t"):
        raise ValueError("a name with a tab, or of several lines - rename it")
    if len(parts) < 2:
        raise ValueError(f"names no folder in a bucket - write {scheme}://{key or 'BUCKET'}/FOLDER")
    if any(part in ("", ".", "..") for part in parts) or rest.startswith("/"):
        raise ValueError("has an empty name, . or .. in it - write each folder once, without them")
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
        raise ValueError(f"a name of more than {MAX_NAME_BYTES} bytes - take a shorter one")
    return Location(ALIASES[scheme], key)


def refuse_half_location(path: Path) -> None:
    """Raise `ValueError` for a path that was meant to be a location, as `Path` makes two slashes one."""
    half = HALF_PATH.match(str(path))
    if half:
        parse_location(f"{half[1]}://{half[2]}")  # has a reason of its own, often
    if half or HALF_URL.match(str(path)):
        raise ValueError(f"is no location - write {EXAMPLES}")


def map_locations(value: Any) -> Any:
    """The value with each text that names a location replaced by its local path; raises `ValueError` like the above."""
    if isinstance(value, str):
        place = parse_location(value)
        if isinstance(place, Location):
            return str(place.folder)
        return value if place is None else str(place)
    if isinstance(value, list | tuple):
        return type(value)(map(map_locations, value))
    return {name: map_locations(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def locations_in(value: Any) -> list[Location]:
    """The locations in whose working folders the absolute paths of a value lie; what holds others comes before them."""
    if isinstance(value, str | Path):
        place = location_of(Path(value)) if os.path.isabs(value) else None  # noqa: PTH117 - a text may be no path
        return [] if place is None else [place]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sorted(
        {place for one in inner for place in locations_in(one)}, key=lambda place: (len(place.key), place.key)
    )


def location_of(path: Path) -> Location | None:
    """The location whose working folder `path` is, or lies in, where its links lead, or else by its name.

    None for any other path. `Location.folder` of what is returned is the one name under which a file's lock and its
    synced state are known.
    """
    home, named = f"{storage_folder()}/", os.path.abspath(path)  # noqa: PTH100 - the folder may not exist
    try:
        real = os.path.realpath(path)
    except ValueError:  # a text that is no path
        real = named
    # Of a working folder that was moved to another disk, with a link in its place, the name counts.
    text = real if real.startswith(home) else named
    if not text.startswith(home):
        return None
    store, _, key = text.removeprefix(home).partition("/")
    scheme = store.partition("-")[0]
    return Location(scheme, key) if scheme in ALIASES and store == store_name(scheme) and "/" in key else None


def show_locations(value: Any) -> Any:
    """The value with each path in a working folder replaced by its location, in every text of it."""
    if isinstance(value, dict):
        return {name: show_locations(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [*map(show_locations, value)]
    home = str(storage_folder())
    if not isinstance(value, str) or home not in value:
        return value
    for scheme in dict.fromkeys(ALIASES.values()):
        value = value.replace(f"{home}/{store_name(scheme)}/", f"{scheme}://")
    return value


def shown_here(path: Path) -> str:
    """A path in a working folder as it is meant itself: the same one, written so that `show_locations` leaves it."""
    home, text = f"{storage_folder()}/", str(path)
    return f"{home}./{text.removeprefix(home)}" if text.startswith(home) else text


def store_name(scheme: str) -> str:
    """The name of a store's folder: of another address than the usual one, with a hash of the address."""
    address = next((value for name in ENDPOINT_VARIABLES[scheme] if (value := os.environ.get(name))), "")
    return f"{scheme}-{hashlib.sha256(address.encode()).hexdigest()[:8]}" if address else scheme
