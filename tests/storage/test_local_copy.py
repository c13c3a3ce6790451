"""The bounded copy of remote shards: whole, checked, shared by processes, and never larger than its bound."""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_of_records import cache_in
from fetching import fetch_all
from s3_server import FaultyProxy

from shards.files.local_copy import fetch_ahead
from shards.manifest import Manifest
from shards.reader import Reader
from stages.system.refusal import Refused
from stages.system.storage import local_copy
from stages.system.storage.local_copy import hold_copy, limit_bytes
from stages.system.storage.locations import Location
from stages.system.storage.mirror import Mirror
from stages.system.storage.object_store import store_of

SHARDS = 6


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A cache of this machine."""
    return cache_in(tmp_path / "local" / "cache", SHARDS)


@pytest.fixture
def remote(local: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """The same in a bucket, brought to a machine that has no shard of it."""
    location = Location("s3", f"{bucket}/run/cache")
    shutil.copytree(local, location.folder)
    Mirror(location).send()
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "fresh"))
    Mirror(location).bring()
    return location


def shard_bytes(local: Path) -> int:
    return max(shard.bytes for shard in Manifest.open(local).shards)


def copies(location: Location) -> list[Path]:
    return sorted((location.folder / "data").glob("*.tar")) if (location.folder / "data").is_dir() else []


def read_all(cache: Path, **options: object) -> list[torch.Tensor]:
    reader = Reader(cache, batch_size=4, memory_budget_bytes=0, **options)  # type: ignore[arg-type]
    batches = reader.batches()
    read = [next(batches) for _ in range(reader.samples_per_epoch // 4)]
    batches.close()  # type: ignore[attr-defined]
    return [batch.x_s for batch in read]


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_cache_reads_as_the_local_one(
    fetched_by: str, local: Path, remote: Location, proxy: FaultyProxy, workers: int, share: float
) -> None:
    proxy.share = share
    for one, other in zip(read_all(local), read_all(remote.folder, workers=workers), strict=True):
        assert torch.equal(one, other)
    assert len(copies(remote)) == SHARDS


def test_a_second_epoch_asks_the_store_for_nothing(remote: Location, proxy: FaultyProxy) -> None:
    read_all(remote.folder)
    before = proxy.requests.total()
    read_all(remote.folder)
    assert proxy.requests.total() == before


@pytest.mark.parametrize("room", [2.2, 3.5])
def test_copies_never_take_more_than_their_bound(
    local: Path, remote: Location, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    limit = int(room * shard_bytes(local))
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", str(limit))
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            sizes = []
            for path in (remote.folder / "data").glob("*"):
                with suppress(FileNotFoundError):
                    sizes.append(path.stat().st_size)
            most.append(sum(sizes))

    (remote.folder / "data").mkdir(exist_ok=True)
    watcher = threading.Thread(target=look)
    watcher.start()
    read = read_all(remote.folder, workers=2)
    done.set()
    watcher.join()
    assert 0 < max(most) <= limit
    assert all(torch.equal(one, other) for one, other in zip(read, read_all(local), strict=True))


def test_the_least_recently_used_goes_and_one_that_is_read_stays(
    local: Path, remote: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = shard_bytes(local)
    paths = [remote.folder / shard.file for shard in Manifest.open(local).shards_of("train")]
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", str(3 * size))
    held = hold_copy(paths[0], size)
    for path in (paths[1], paths[2], paths[1], paths[3]):
        hold_copy(path, size)
    assert copies(remote) == sorted([paths[0], paths[1], paths[3]])
    del held
    hold_copy(paths[4], size)
    assert paths[0] not in copies(remote)


def test_what_is_not_sent_yet_is_never_removed(local: Path, remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    size = shard_bytes(local)
    made = remote.folder / "data" / "train-000009.tar"
    made.parent.mkdir(exist_ok=True)
    made.write_bytes(b"1" * size)
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", str(size))
    for shard in Manifest.open(local).shards_of("train"):
        hold_copy(remote.folder / shard.file, shard.bytes)
    assert made.exists()
    Mirror(remote).send()
    assert store_of(remote).info(remote / "data/train-000009.tar")


def test_a_bound_that_is_too_small_is_one_line(local: Path, remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_copy, "WAIT_SECONDS", 0.1)
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", "1kB")
    with pytest.raises(Refused, match="raise SOLLUNE_STORAGE_BYTES"):
        read_all(remote.folder)


@pytest.mark.parametrize("text", ["many", "-1", "0", "3 parsecs"])
def test_a_bound_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", text)
    with pytest.raises(Refused, match="should be bytes such as"):
        limit_bytes()


@pytest.mark.parametrize(("text", "size"), [("1kB", 1000), ("1.5 GiB", 3 << 29), ("200GB", 2 * 10**11), ("7", 7)])
def test_a_bound_has_units(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", text)
    assert limit_bytes() == size


def test_a_missing_object_is_one_line(remote: Location) -> None:
    shard = Manifest.open(remote.folder).shards_of("train")[2]
    reader = Reader(remote.folder, memory_budget_bytes=0)
    store_of(remote).delete(remote / shard.file)
    with pytest.raises(Refused, match=rf"{shard.file}: .* - ") as refusal:
        list(reader.records())
    assert "\n" not in str(refusal.value)
    Mirror(remote).bring()
    with pytest.raises(Refused, match=rf"{shard.file}: missing - "):
        Reader(remote.folder)


@pytest.mark.parametrize("length", ["same", "other"])
def test_a_changed_object_is_one_line(remote: Location, length: str) -> None:
    shard = Manifest.open(remote.folder).shards_of("train")[2]
    reader = Reader(remote.folder, memory_budget_bytes=0)
    content = bytearray(store_of(remote).read(remote / shard.file) or b"")
    content[len(content) // 2] ^= 1
    store_of(remote).put_whole(remote / shard.file, bytes(content if length == "same" else content[:-512]))
    ways_out = "start this command again - sollune shards repair .* makes it again"
    with pytest.raises(Refused, match=rf"{shard.file}: .*manifest says .*{ways_out}"):
        list(reader.records())


def test_a_copy_that_rots_is_fetched_again(local: Path, remote: Location) -> None:
    read_all(remote.folder)
    path = copies(remote)[0]
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for one, other in zip(read_all(local), read_all(remote.folder), strict=True):
        assert torch.equal(one, other)


def test_processes_of_a_machine_fetch_a_shard_once(remote: Location, proxy: FaultyProxy) -> None:
    files = [(shard.file, shard.bytes) for shard in Manifest.open(remote.folder).shards]
    context = multiprocessing.get_context("spawn")
    before = proxy.requests["GET"]
    processes = [context.Process(target=fetch_all, args=(remote.folder, files)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert proxy.requests["GET"] - before == len(files)


def test_the_next_shards_are_fetched_while_the_first_are_read() -> None:
    fetched: list[int] = []
    items = fetch_ahead(range(20), lambda n: [n // 2], fetched.append, 4)
    assert next(items) == 0
    threading.Event().wait(0.2)
    assert sorted(fetched) == [0, 1, 2, 3]
    rest = []
    for item in items:
        rest.append(item)
        threading.Event().wait(0.01)
    assert rest == [*range(1, 20)]
    assert sorted(fetched) == [*range(10)]


def test_an_endless_stream_is_looked_at_as_far_as_it_is_used() -> None:
    def endless() -> Iterator[int]:
        yield from iter(lambda: next(numbers), -1)

    numbers = iter(range(10**9))
    items = fetch_ahead(endless(), lambda n: [n % 3], lambda _: None, 3)
    assert [next(items) for _ in range(10)] == [*np.arange(10)]
    items.close()  # type: ignore[attr-defined]
    assert next(numbers) < 20_000
