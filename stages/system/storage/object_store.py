"""The one door to object stores: whole objects by name through fsspec, tried again while an error may pass.

fsspec and what lies below it are imported with the first store, so that local paths never pay for them.
"""

import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from stages.system.atomic import temporary_path
from stages.system.refusal import Refused, in_one_line
from stages.system.storage.locations import Location, store_name
from stages.system.storage.obstore_reader import ObstoreReader
from stages.system.storage.store_errors import LOGINS, http_status, lasting_refusal

TRIES = 8
MAX_PIPED_BYTES = 64 << 20
"""Larger files never change once they are there, and are sent in parts."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.1, 20.0
PACKAGES = {"s3": '"sollune[remote]"', "gs": "gcsfs", "hf": "huggingface_hub"}
CREATES = ("s3", "gs")
"""Stores that put an object only where none is: what claims between machines need."""
PRECONDITION_FAILED = 412

T = TypeVar("T")


class Truncated(OSError):
    """An object arrived with another length than the store says; it is tried again."""


@dataclass(frozen=True)
class StoredObject:
    """What a store tells about an object."""

    size: int
    version: str
    """changes with the content: its ETag or hash, or else size and time"""
    modified: float
    """by the store's clock, s since 1970; 0 where it does not tell"""

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "StoredObject":
        """From fsspec's description."""
        named = next((str(info[name]) for name in ("ETag", "etag", "md5Hash", "blob_id", "oid") if info.get(name)), "")
        time_of: Any = next((info[name] for name in ("LastModified", "mtime", "updated") if info.get(name)), None)
        modified = float(time_of.timestamp()) if hasattr(time_of, "timestamp") else 0.0
        return cls(int(info["size"]), named.strip('"') or f"{info['size']} {time_of}", modified)


class ObjectStore:
    """The objects of one scheme; an error that lasts is refused in one line that names the object."""

    def __init__(self, scheme: str) -> None:
        self.scheme, self._files = scheme, _open_file_system(scheme)
        self._reader = ObstoreReader.of(self._files) if scheme == "s3" else None

    def find(self, folder: Location, tries: int = TRIES) -> dict[str, StoredObject]:
        """Name below `folder` -> each object; none where there is no such folder."""

        def find() -> dict[str, StoredObject]:
            self._files.invalidate_cache()
            infos = self._files.find(folder.key, detail=True)
            if not infos and self.scheme == "s3":  # an empty folder, or no bucket at all
                self._files.call_s3("head_bucket", Bucket=folder.bucket)
            below = f"{folder.key}/"
            return {
                name.removeprefix(below): StoredObject.from_info(info)
                for name, info in infos.items()
                if info["type"] == "file" and name.startswith(below) and not name.endswith("/")
            }

        try:
            return self._try(folder, find, tries)
        except FileNotFoundError as error:
            if self.scheme == "s3":
                raise Refused(f"{folder}: there is no bucket {folder.bucket} - make it, or mend its name") from error
            return {}

    def info(self, location: Location) -> StoredObject | None:
        """An object; None where there is none."""
        try:
            return self._try(location, lambda: StoredObject.from_info(self._file_info(location)))
        except FileNotFoundError:
            return None

    def read(self, location: Location) -> bytes | None:
        """The content of a small object; None where there is none."""

        def read() -> bytes:
            content: bytes = self._files.cat_file(location.key)
            return content

        try:
            return self._try(location, read)
        except FileNotFoundError:
            return None

    def get_whole(self, location: Location, target: Path) -> StoredObject:
        """Fetch an object into a file that appears whole; raises `FileNotFoundError` where there is none."""

        def get() -> StoredObject:
            stored = StoredObject.from_info(self._file_info(location))
            self._files.get_file(location.key, str(temporary))
            if (size := temporary.stat().st_size) != stored.size:
                raise Truncated(f"{size} bytes arrived of {stored.size}")
            return stored

        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(target)
        try:
            stored, problem = self._fetch_by_obstore(location, temporary)
            if stored is None:
                stored = self._try(location, get)
                if problem is not None and self._reader is not None:
                    self._reader.count_failure(location, problem)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return stored

    def _fetch_by_obstore(self, location: Location, target: Path) -> tuple[StoredObject | None, Exception | None]:
        """The object, where obstore fetched it, and else the error that it raised, if any; s3fs comes after it."""
        try:
            if self._reader is None or (fetched := self._reader.fetch(location, target)) is None:
                return None, None
            if (size := target.stat().st_size) != fetched.size:
                raise Truncated(f"{size} bytes arrived of {fetched.size}")
        except Exception as error:  # of many kinds; what lasts s3fs meets, too
            return None, error
        return StoredObject(fetched.size, fetched.etag or f"{fetched.size} {fetched.modified}", fetched.modified), None

    def put_whole(self, location: Location, content: Path | bytes) -> StoredObject:
        """Store a file, or these bytes; the object appears whole, and its size is read back.

        Raises `FileNotFoundError` for a file that is gone.
        """

        def put() -> StoredObject:
            if isinstance(content, Path) and (size := content.stat().st_size) > MAX_PIPED_BYTES:
                self._files.put_file(str(content), location.key)
            else:  # a log may grow meanwhile
                piped = content if isinstance(content, bytes) else content.read_bytes()
                size = len(piped)
                self._files.pipe_file(location.key, piped)
            stored = StoredObject.from_info(self._file_info(location))
            if stored.size != size:
                raise Truncated(f"{stored.size} bytes were stored of {size}")
            return stored

        try:
            return self._try(location, put)
        except FileNotFoundError as error:
            if isinstance(content, Path) and not content.exists():
                raise
            raise Refused(f"{location}: cannot be stored ({in_one_line(error)}) - make its bucket") from error

    def create(self, location: Location, content: bytes) -> bool:
        """Store an object where there is none; False where there is one, which stays as it is.

        Raises `Refused` for a store that cannot decide between two machines.
        """
        if self.scheme not in CREATES:
            raise Refused(
                f"{location}: {self.scheme}:// has no conditional put, so two machines could claim the same work - "
                "work in a local folder or in s3://, and publish the result"
            )
        try:
            self._try(location, lambda: self._files.pipe_file(location.key, content, mode="create"))
        except FileExistsError:  # or a try whose answer was lost has made it: the content names its owner
            return self.read(location) == content
        return True

    def replace(self, location: Location, content: bytes, expected: StoredObject) -> bool:
        """Store an object in the place of the one that is `expected`; False where it is another by now.

        The store itself compares, so of several that replace it one succeeds.
        """

        def replace() -> None:
            if self.scheme == "s3":
                self._files.pipe_file(location.key, content, IfMatch=f'"{expected.version}"')
                return
            info = self._file_info(location)
            if StoredObject.from_info(info) != expected:
                raise FileExistsError(str(location))
            # gcsfs puts only where nothing is; the request that it would send takes another generation, too.
            options = {"uploadType": "media", "name": location.key.partition("/")[2]}
            place = f"{self._files.base.replace('/storage/', '/upload/storage/')}b/{{}}/o"
            options["ifGenerationMatch"] = str(info["generation"])
            self._files.call("POST", place, location.bucket, data=content, **options)

        if self.scheme not in CREATES:
            raise Refused(f"{location}: {self.scheme}:// has no conditional put - work in s3:// or gs://")
        try:
            self._try(location, replace)
        except (FileExistsError, FileNotFoundError):
            return self.read(location) == content
        return True

    def delete(self, location: Location) -> None:
        """Delete an object, if it is there."""
        with suppress(FileNotFoundError):
            self._try(location, lambda: self._files.rm_file(location.key))

    def _file_info(self, location: Location) -> Mapping[str, Any]:
        self._files.invalidate_cache()
        info: Mapping[str, Any] = self._files.info(location.key)
        if info["type"] != "file":
            raise FileNotFoundError(str(location))
        return info

    def _try(self, location: Location, action: Callable[[], T], tries: int = TRIES) -> T:
        for number in range(1, tries + 1):
            try:
                return action()
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # transports raise many kinds
                if PRECONDITION_FAILED in (http_status(error), http_status(error.__cause__)):
                    raise FileExistsError(str(location)) from error
                if refusal := lasting_refusal(location, error):
                    raise refusal from error
                if number == tries:
                    raise Refused(
                        f"{location}: cannot be reached ({type(error).__name__}: {in_one_line(error)}), {tries} "
                        "tries - look at the network and the store's address; the same command goes on from here"
                    ) from error
            pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (number - 1))
            time.sleep(pause * random.uniform(0.5, 1))
        raise AssertionError("unreachable")


def store_of(location: Location) -> ObjectStore:
    """The store of a location, one in each process for each address."""
    return _store(location.scheme, store_name(location.scheme), os.getpid())


@lru_cache
def _store(scheme: str, _name: str, _process: int) -> ObjectStore:
    return ObjectStore(scheme)


def _open_file_system(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if scheme == "s3":
            _retry_in_s3fs()
            # One place tries again, and soon: the pauses of botocore grow to many seconds.
            config = {"retries": {"max_attempts": 0}} | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = config
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise Refused(
            f"{scheme}://: needs a package that is not installed ({in_one_line(error)}) - "
            f"pip install {PACKAGES[scheme]}"
        ) from error
    except Exception as error:  # gcsfs looks for credentials here, and each library in its own way
        place = Location(scheme, "")
        raise lasting_refusal(place, error) or Refused(
            f"{scheme}://: cannot be opened ({type(error).__name__}: {in_one_line(error)}) - {LOGINS[scheme]}"
        ) from error


def _retry_in_s3fs() -> None:
    """Let s3fs repeat a single request, or part, of a large object that failed in passing."""
    from s3fs.core import set_custom_error_handler

    set_custom_error_handler(lambda error: http_status(error) >= 500 or isinstance(error, ConnectionError))
