"""Whole objects through requests that fail: what arrives is what was sent, and what cannot pass is one clear line."""

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from s3_server import KINDS, FaultyProxy

from stages.system.refusal import Refused
from stages.system.storage import object_store
from stages.system.storage.locations import Location
from stages.system.storage.object_store import store_of


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_whole_though_requests_fail(
    fetched_by: str, bucket: str, proxy: FaultyProxy, tmp_path: Path, kind: str
) -> None:
    place = Location("s3", f"{bucket}/ä b/data.bin")
    store = store_of(place)
    proxy.share, proxy.kinds = 0.3, (kind,)
    content = os.urandom(300_000)
    for number in range(6):
        store.put_whole(place, content[number:])
        store.get_whole(place, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content[number:]
        assert store.read(place) == content[number:]
    assert proxy.faults[kind]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".copy")] == []


def test_a_file_in_parts_appears_when_its_last_part_is_there(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "MAX_PIPED_BYTES", 1 << 20)
    place = Location("s3", f"{bucket}/large")
    store = store_of(place)
    monkeypatch.setattr(store._files, "put_file", partial(store._files.put_file, chunksize=5 << 20))
    file = tmp_path / "large"
    file.write_bytes(os.urandom(18 << 20))
    seen: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            if stored := store.info(place):
                seen.append(stored.size)

    watcher = threading.Thread(target=look)
    watcher.start()
    proxy.share, proxy.kinds = 0.2, ("error before", "reset")
    store.put_whole(place, file)
    done.set()
    watcher.join()
    assert proxy.requests["POST"] >= 2  # begun, completed
    assert set(seen) <= {18 << 20}
    store.get_whole(place, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()


def test_one_of_many_creates_an_object(bucket: str, proxy: FaultyProxy) -> None:
    place = Location("s3", f"{bucket}/claim")
    proxy.share = 0.2
    results: dict[int, bool] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.__setitem__(n, store_of(place).create(place, b"%d" % n)))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, is_created in results.items() if is_created]
    assert len(winners) == 1
    assert store_of(place).read(place) == b"%d" % winners[0]


def test_an_object_that_changed_is_not_replaced(bucket: str, proxy: FaultyProxy) -> None:
    place = Location("s3", f"{bucket}/claim")
    store = store_of(place)
    first = store.put_whole(place, b"first")
    assert store.replace(place, b"second", first)
    assert not store.replace(place, b"third", first)
    assert store.read(place) == b"second"


def test_a_store_that_cannot_create_refuses_claims() -> None:
    store = object.__new__(object_store.ObjectStore)
    store.scheme = "hf"
    with pytest.raises(Refused, match=r"no conditional put.* - "):
        store.create(Location("hf", "datasets/a/b/claim"), b"")


def test_a_store_out_of_reach_is_one_line(bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "FIRST_PAUSE_SECONDS", 0.001)
    proxy.share, proxy.kinds = 1.0, ("error before",)
    place = Location("s3", f"{bucket}/x")
    store = store_of(place)
    store._files.retries = 1
    with pytest.raises(Refused, match=f"{place}: cannot be reached .* - ") as refusal:
        store.put_whole(place, b"1")
    assert "\n" not in str(refusal.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(Refused, match=r"gs://: needs a package .*gcsfs.* - pip install gcsfs"):
        object_store.ObjectStore("gs")


class GoogleFiles:
    """gcsfs' file system, in which another machine acts after the next `info`; each request is done by itself."""

    base = "https://storage.googleapis.com/storage/v1/"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.after_info = lambda: None

    def invalidate_cache(self) -> None:
        """Nothing is kept."""

    def info(self, key: str) -> dict[str, Any]:
        if key not in self.objects:
            raise FileNotFoundError(key)
        content, generation = self.objects[key]
        result = {"type": "file", "size": len(content), "etag": f"e{generation}", "generation": str(generation)}
        action, self.after_info = self.after_info, lambda: None
        action()
        return result

    def cat_file(self, key: str) -> bytes:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key][0]

    def call(self, method: str, path: str, *arguments: str, data: bytes, **parameters: str) -> None:
        assert (method, parameters["uploadType"]) == ("POST", "media")
        assert path.format(*arguments) == "https://storage.googleapis.com/upload/storage/v1/b/bucket/o"
        key = f"{arguments[0]}/{parameters['name']}"
        if str(self.objects.get(key, (b"", 0))[1]) != parameters["ifGenerationMatch"]:
            raise FileExistsError(key)  # so gcsfs answers 412
        self.put(key, data)

    def put(self, key: str, content: bytes) -> None:
        self.objects[key] = content, self.objects.get(key, (b"", 6))[1] + 1


def test_google_storage_replaces_an_object_for_one_of_two() -> None:
    store, files = object.__new__(object_store.ObjectStore), GoogleFiles()
    store.scheme, store._files = "gs", files
    place = Location("gs", "bucket/a b/.claim")
    files.put(place.key, b"stale")
    stored = store.info(place)
    assert stored is not None
    files.after_info = lambda: files.put(place.key, b"of the other")
    assert not store.replace(place, b"ours", stored)
    assert store.read(place) == b"of the other"
    stored = store.info(place)
    assert stored is not None
    assert store.replace(place, b"ours", stored)
    assert store.read(place) == b"ours"
    del files.objects[place.key]
    assert not store.replace(place, b"again", stored)
