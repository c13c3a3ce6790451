"""Whole objects through requests that fail: what arrives is what was sent, and what cannot pass is one clear line."""

import os
import threading
from functools import partial
from pathlib import Path

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
