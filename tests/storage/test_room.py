"""Room for copies of remote shards: the readers of a machine give up what they hold for each other."""

import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest
from cache_of_records import cache_in
from fetching import hold_all

from shards import opened
from shards.archive import Shard
from shards.manifest import Manifest
from shards.opened import OpenShards
from shards.reader import Reader
from stages.system.refusal import Refused
from stages.system.sharing import link
from stages.system.storage import local_copy
from stages.system.storage.local_copy import drop_copy, hold_copy, limit_bytes, stored_size
from stages.system.storage.locations import Location
from stages.system.storage.object_store import StoredObject
from stages.system.storage.sync_state import ABSENT, SyncedFile, write_synced

SHARDS = 10
RUN = Location("s3", "bucket/run")


class FolderStore:
    """Objects that are the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_whole(self, location: Location, target: Path) -> StoredObject:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        shutil.copyfile(self.folder / location.key.removeprefix(f"{RUN.key}/"), temporary)
        temporary.replace(target)
        return StoredObject(target.stat().st_size, "v", 0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of this machine with a cache."""
    return cache_in(tmp_path_factory.mktemp("local") / "cache", SHARDS).parent


@pytest.fixture
def cache(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the same cache in a store; no shard of it is here."""
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setattr(local_copy, "store_of", lambda _: FolderStore(run))
    monkeypatch.setattr(local_copy, "WAIT_SECONDS", 0.1)
    folder = RUN.folder / "cache"
    folder.mkdir(parents=True)
    shutil.copyfile(run / "cache" / "manifest.json", folder / "manifest.json")
    for shard in Manifest.open(folder).shards:
        write_synced(folder / shard.file, SyncedFile(shard.bytes, ABSENT, "v"))
    return folder


@pytest.fixture
def shards(run: Path) -> tuple[Shard, ...]:
    return Manifest.open(run / "cache").shards


def set_room(monkeypatch: pytest.MonkeyPatch, shards: tuple[Shard, ...], count: float) -> None:
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", str(int(count * largest(shards))))


def largest(shards: tuple[Shard, ...]) -> int:
    return max(shard.bytes for shard in shards)


def read(reader: OpenShards, shard: Shard) -> str:
    return reader.record(shard, shard.offsets[0]).key


def descriptors(*folders: Path) -> int:
    """The files below some folders that this process has open."""
    targets = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(any(target.is_relative_to(folder) for folder in folders) for target in targets)


def copies(cache: Path) -> list[str]:
    return sorted(f"data/{path.name}" for path in (cache / "data").glob("*.tar"))


@pytest.mark.parametrize(("readers", "room"), [(4, 3.2), (2, 1.5), (3, 6.1), (5, 4.0)])
def test_all_readers_of_a_process_share_the_room(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch, readers: int, room: float
) -> None:
    set_room(monkeypatch, shards, room)
    opened = [OpenShards(cache, largest=largest(shards)) for _ in range(readers)]
    for number, shard in enumerate(shards):
        assert read(opened[number % readers], shard) == shard.first_key
        assert len(copies(cache)) <= room
    for reader in opened:  # each reads what another gave up
        assert [read(reader, shard) for shard in shards] == [shard.first_key for shard in shards]


def test_what_this_process_holds_is_given_up_before_it_is_refused(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, shards, 9)
    reader = OpenShards(cache, largest=largest(shards))
    for shard in shards[:5]:
        read(reader, shard)
    set_room(monkeypatch, shards, 2.5)
    assert read(reader, shards[5]) == shards[5].first_key
    assert copies(cache) == [shards[4].file, shards[5].file], "those used last stay"
    assert read(reader, shards[0]) == shards[0].first_key


def test_copies_that_nobody_holds_go_first(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, shards, 6)
    reader = OpenShards(cache, largest=largest(shards))
    for shard in shards[:2]:
        read(reader, shard)
    for shard in shards[2:6]:
        hold_copy(cache / shard.file, shard.bytes)
    read(reader, shards[6])
    assert copies(cache) == [shard.file for shard in (*shards[:2], *shards[3:7])]


def test_a_copy_that_is_read_this_moment_is_never_given_up(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, shards, 1.5)
    one, other = (OpenShards(cache, largest=largest(shards)) for _ in range(2))
    handle = one._handle(shards[0])
    with pytest.raises(Refused, match="raise SOLLUNE_STORAGE_BYTES"):
        read(other, shards[1])
    assert os.pread(handle.fd, 10, 0) == (cache / shards[0].file).read_bytes()[:10]
    del handle
    assert read(other, shards[1]) == shards[1].first_key


def test_who_waits_for_room_keeps_no_other_from_fetching(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = largest(shards)
    set_room(monkeypatch, shards, 2)
    held = [hold_copy(cache / shards[0].file, shards[0].bytes)]

    def meanwhile(_seconds: float) -> None:
        if len(held) == 1:
            held.append(hold_copy(cache / shards[1].file, shards[1].bytes))
        elif held:
            held.clear()

    monkeypatch.setattr(local_copy, "WAIT_SECONDS", 30)
    monkeypatch.setattr(local_copy.time, "sleep", meanwhile)
    local_copy.reserve_room(cache / "data/large.tar", 2 * size)
    assert copies(cache) == []


def test_other_processes_give_up_what_they_hold(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, shards, 5)
    files = [(shard.file, shard.bytes) for shard in shards[:5]]
    for file, size in files:
        hold_copy(cache / file, size)
    context = multiprocessing.get_context("spawn")
    held, ended = context.Event(), context.Event()
    process = context.Process(target=hold_all, args=(cache, files, held, ended), daemon=True)
    process.start()
    try:
        assert held.wait(60)
        monkeypatch.setattr(local_copy, "WAIT_SECONDS", 30)
        reader = OpenShards(cache, largest=largest(shards))
        assert [read(reader, shard) for shard in shards[5:8]] == [shard.first_key for shard in shards[5:8]]
        assert len(copies(cache)) == 5
    finally:
        ended.set()
        process.join(30)
    assert process.exitcode == 0


def test_what_fills_the_disk_later_lowers_no_default_bound(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    size, rest = largest(shards), [24]
    monkeypatch.delenv("SOLLUNE_STORAGE_BYTES", raising=False)
    monkeypatch.setattr(local_copy, "free_bytes", lambda _: size * (rest[0] - len(copies(cache))))
    reader, before = OpenShards(cache, largest=size), limit_bytes()
    for shard in shards[:8]:
        read(reader, shard)
    rest[0] = 12  # a checkpoint
    assert read(reader, shards[8]) == shards[8].first_key
    assert limit_bytes() == before == 12 * size
    assert len(copies(cache)) == 9


@pytest.mark.parametrize("bound", ["", "1 TB"])
def test_copies_make_way_where_the_disk_is_full(
    cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    size, rest = largest(shards), [24]
    monkeypatch.setenv("SOLLUNE_STORAGE_BYTES", bound)
    monkeypatch.setattr(local_copy, "free_bytes", lambda _: size * (rest[0] - len(copies(cache))))
    reader = OpenShards(cache, largest=size)
    for shard in shards[:6]:
        read(reader, shard)
    rest[0] = 6
    assert read(reader, shards[6]) == shards[6].first_key
    assert copies(cache) == [shard.file for shard in shards[1:7]]


@pytest.fixture(params=["on this machine", "in a store"])
def linked(request: pytest.FixtureRequest, cache: Path, tmp_path: Path) -> Path:
    """A folder, of this machine or a working folder, in which a run of a study lies: its cache is a link."""
    home = tmp_path / "out/0" if request.param == "on this machine" else Location("s3", "bucket/study").folder / "0"
    link(home / "cache", cache)
    return home


def test_a_linked_cache_reads_as_the_one_that_it_leads_to(
    linked: Path, cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, shards, 2.5)
    assert all(shard.size_fault(linked / "cache") is None for shard in shards)
    read = [record.key for record in Reader(linked).records()]
    assert read == [f"{number:09d}" for number in range(4 * SHARDS)]
    assert len(copies(cache)) == 2
    assert shards[0].fault(linked / "cache") is None
    assert stored_size(linked / "cache" / shards[5].file) == shards[5].bytes
    drop_copy(linked / "cache" / shards[0].file)
    assert shards[0].file not in copies(cache)


def test_what_is_read_through_a_link_is_held(
    linked: Path, cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_room(monkeypatch, shards, 2)
    held = hold_copy(linked / "cache" / shards[0].file, shards[0].bytes)
    assert held is not None
    for shard in shards[1:4]:
        hold_copy(cache / shard.file, shard.bytes)
    assert copies(cache) == [shards[0].file, shards[3].file]
    one, other = (OpenShards(folder, largest=largest(shards)) for folder in (linked / "cache", cache))
    assert read(one, shards[1]) == read(other, shards[1])
    held.release()
    set_room(monkeypatch, shards, 1.5)
    assert read(other, shards[2]) == shards[2].first_key
    assert copies(cache) == [shards[2].file]


@pytest.mark.parametrize("is_remote", [True, False])
def test_open_shards_leave_half_of_the_descriptors_to_others(
    run: Path, cache: Path, shards: tuple[Shard, ...], monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    set_room(monkeypatch, shards, 99)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 4096))
    folder = cache if is_remote else run / "cache"
    readers = [OpenShards(folder, sizes=16, largest=largest(shards)) for _ in range(3)]
    for reader in readers:
        for shard in shards:
            read(reader, shard)
            assert 0 < descriptors(folder, RUN.folder.parents[2]) <= 10
    assert len(readers[-1]._handles) > 1, "the one that reads keeps some open"


def test_a_process_without_a_bound_of_descriptors_opens_as_many_as_it_uses(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert OpenShards(run / "cache", sizes=16)._max_open == 2 * opened.WINDOW * opened.MAX_OPEN_WINDOWS
