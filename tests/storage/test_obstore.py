"""Objects fetched by obstore and by s3fs: the same bytes, versions and refusals."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import certifi
import pytest
from fetching import fetch_all
from s3_server import KINDS, FaultyProxy

pytest.importorskip("obstore", reason="obstore is not installed")

from stages.system.refusal import Refused
from stages.system.storage import object_store, obstore_reader
from stages.system.storage.locations import Location
from stages.system.storage.object_store import ObjectStore, store_of
from stages.system.storage.obstore_reader import ObstoreReader

NAMES = [
    "plain", "a b/ä", "a b", "a%20b", "a%2520b", "a+b&c=d", "a#b?c", "a", "tilde~*", "[x]{y}|z^`\"<>", "..x/x..",
    "x%2Fy", "x/y", "ends/in/.dot",
]  # fmt: skip


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many objects obstore fetched, and how many it gave to s3fs."""
    counts = {"obstore": 0, "s3fs": 0}
    fetch = ObjectStore._fetch_by_obstore

    def count(store: ObjectStore, location: Location, target: Path) -> Any:
        result = fetch(store, location, target)
        counts["obstore" if result[0] is not None else "s3fs"] += 1
        return result

    monkeypatch.setattr(ObjectStore, "_fetch_by_obstore", count)
    return counts


def test_an_object_is_the_same_by_both(bucket: str, fetches: dict[str, int], tmp_path: Path) -> None:
    folder = Location("s3", f"{bucket}/folder")
    store = store_of(folder)
    for name in NAMES:  # each might be taken for another, by what it is escaped or cut to
        store.put_whole(folder / name, f"content of {name}".encode())
    store.put_whole(folder / "empty", b"")
    for name in (*NAMES, "empty"):
        assert store.get_whole(folder / name, tmp_path / "copy") == store.info(folder / name)
        assert (tmp_path / "copy").read_text() == (f"content of {name}" if name != "empty" else "")
    assert fetches == {"obstore": len(NAMES) + 1, "s3fs": 0}


def test_what_fails_by_obstore_is_fetched_by_s3fs(
    bucket: str, proxy: FaultyProxy, fetches: dict[str, int], tmp_path: Path
) -> None:
    place = Location("s3", f"{bucket}/data")
    content = os.urandom(200_000)
    store_of(place).put_whole(place, content)
    for kind in KINDS:
        proxy.share, proxy.kinds = 0.3, (kind,)
        for _ in range(8):
            store_of(place).get_whole(place, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == content
    assert all(proxy.faults[kind] for kind in KINDS)
    assert fetches["obstore"] > fetches["s3fs"] > 0


def test_a_missing_object_is_missing_by_both(bucket: str, fetched_by: str, tmp_path: Path) -> None:
    place = Location("s3", f"{bucket}/nothing")
    with pytest.raises(FileNotFoundError):
        store_of(place).get_whole(place, tmp_path / "copy")
    assert list(tmp_path.glob("*copy*")) == []


@pytest.mark.parametrize("answer", [403, 500])
def test_refusals_are_the_same_by_both(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    monkeypatch.setattr(object_store, "FIRST_PAUSE_SECONDS", 0.001)
    lines = []
    for by in ("obstore", "s3fs"):
        object_store._store.cache_clear()
        if by == "s3fs":
            monkeypatch.setattr(ObstoreReader, "of", lambda _files: None)
        place = Location("s3", f"{bucket}/x")
        store = store_of(place)
        store._files.retries = 1
        proxy.share, proxy.kinds = 1.0, (f"status {answer}",)
        with pytest.raises(Refused, match=" - ") as refusal:
            store.get_whole(place, tmp_path / "copy")
        lines.append(str(refusal.value))
    object_store._store.cache_clear()
    assert lines[0] == lines[1]


def test_an_obstore_that_never_succeeds_is_left_alone_with_one_line(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Location("s3", f"{bucket}/data")
    object_store._store.cache_clear()
    store = store_of(place)
    store.put_whole(place, b"1")
    monkeypatch.setattr(obstore_reader, "_open_store", lambda *_: (_ for _ in ()).throw(ValueError("another region")))
    for _ in range(obstore_reader.MAX_FAILURES + 3):
        store.get_whole(place, tmp_path / "copy")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "another region" in lines[0]
    object_store._store.cache_clear()


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_certificates_of_the_user_leave_all_to_s3fs(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in obstore_reader.CERTIFICATE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    stores = []
    for address, certificates in (("http", True), ("https", False), ("https", True)):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"{address}://127.0.0.1:1{int(certificates)}")
        if certificates:
            monkeypatch.setenv(name, certifi.where())
        else:
            monkeypatch.delenv(name, raising=False)
        reader = store_of(Location("s3", "bucket/x"))._reader
        assert reader is not None
        stores.append(reader._store("bucket"))
    assert [store is not None for store in stores] == [True, True, False]


def test_settings_of_fsspec_leave_all_to_s3fs(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    files = store_of(Location("s3", f"{bucket}/x"))._files
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://localhost:1"})
    assert ObstoreReader.of(files) is not None
    monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": True})
    assert ObstoreReader.of(files) is None


def test_a_profile_names_its_credentials_to_both(
    bucket: str, fetches: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Location("s3", f"{bucket}/data")
    store_of(place).put_whole(place, b"1")
    (tmp_path / "credentials").write_text("[other]\naws_access_key_id = another\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    object_store._store.cache_clear()
    keys: list[str] = []
    open_store = obstore_reader._open_store
    monkeypatch.setattr(
        obstore_reader, "_open_store", lambda *options: (keys.append(options[3]), open_store(*options))[1]
    )
    store_of(place).get_whole(place, tmp_path / "copy")
    object_store._store.cache_clear()
    assert keys == ["another"]
    assert fetches == {"obstore": 1, "s3fs": 0}


def test_a_fork_of_a_process_that_fetched_fetches_too(bucket: str, tmp_path: Path) -> None:
    place = Location("s3", f"{bucket}/run/data")
    store_of(place).put_whole(place / "a.tar", b"12345")
    store_of(place).get_whole(place / "a.tar", tmp_path / "copy")
    process = multiprocessing.get_context("fork").Process(target=fetch_all, args=[place.folder, [("a.tar", 5)]])
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert (place.folder / "a.tar").read_bytes() == b"12345"
