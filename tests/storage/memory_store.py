"""An object store in the memory of a test, which keeps what was done to it."""

import hashlib
import itertools
from pathlib import Path

import pytest

from stages.system.storage.locations import Location
from stages.system.storage.object_store import StoredObject

USERS = (
    "stages.system.storage.mirror",
    "stages.system.storage.local_copy",
    "stages.system.storage.remote_claim",
    "stages.cache.finished",
)
"""Modules that name `store_of`."""


class MemoryStore:
    """Objects by key, and (operation, key) in the order in which they were done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.log: list[tuple[str, str]] = []
        self._clock = itertools.count(1)
        for module in USERS:
            monkeypatch.setattr(f"{module}.store_of", lambda _: self, raising=False)

    def contents(self, below: str = "") -> dict[str, bytes]:
        """Key -> bytes."""
        return {key: content for key, (content, _) in sorted(self.objects.items()) if key.startswith(below)}

    def find(self, folder: Location, _tries: int = 1) -> dict[str, StoredObject]:
        below = f"{folder.key}/"
        return {key.removeprefix(below): self._stored(key) for key in self.contents(below)}

    def info(self, location: Location) -> StoredObject | None:
        return self._stored(location.key) if location.key in self.objects else None

    def read(self, location: Location) -> bytes | None:
        return self.contents().get(location.key)

    def get_whole(self, location: Location, target: Path) -> StoredObject:
        if (content := self.read(location)) is None:
            raise FileNotFoundError(str(location))
        self.log.append(("get", location.key))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        temporary.write_bytes(content)
        temporary.replace(target)
        return self._stored(location.key)

    def put_whole(self, location: Location, content: Path | bytes) -> StoredObject:
        stored = content if isinstance(content, bytes) else content.read_bytes()
        self.objects[location.key] = stored, float(next(self._clock))
        self.log.append(("put", location.key))
        return self._stored(location.key)

    def create(self, location: Location, content: bytes) -> bool:
        if location.key in self.objects:
            return self.read(location) == content
        self.put_whole(location, content)
        return True

    def replace(self, location: Location, content: bytes, expected: StoredObject) -> bool:
        if self.info(location) != expected:
            return False
        self.put_whole(location, content)
        return True

    def delete(self, location: Location) -> None:
        self.log.append(("delete", location.key))
        self.objects.pop(location.key, None)

    def _stored(self, key: str) -> StoredObject:
        content, modified = self.objects[key]
        return StoredObject(len(content), hashlib.md5(content).hexdigest(), modified)
