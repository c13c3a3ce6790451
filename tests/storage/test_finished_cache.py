"""Several machines fill a cache in an object store: the table is made once, and what is finished stays."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cache_of_records import make_numbered_record, make_small_recipe
from memory_store import MemoryStore

from configs.load import load
from configs.values import PictureSize
from shards.manifest import Manifest
from shards.table import Table, is_tabulated
from shards.writer import CacheWriter
from stages import cache_teacher
from stages.cache.fill import ShardTask
from stages.prompts import Prompt
from stages.system.storage.locations import Location
from stages.system.storage.mirror import Mirror

RUN = Location("s3", "bucket/run")
MANIFEST, COMPLETE = "bucket/run/cache/manifest.json", "bucket/run/cache/COMPLETE"
TASKS = [
    ShardTask("train", index, range(2 * index, 2 * index + 2), [Prompt("a star", "star", 1)] * 2, PictureSize(8, 8), 2)
    for index in range(3)
]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    return MemoryStore(monkeypatch)


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: MemoryStore) -> Callable[[str], None]:
    """Work on the machine of this name from now on."""
    return lambda machine: monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / machine))


def start() -> CacheWriter:
    Mirror(RUN).bring()
    return CacheWriter(RUN.folder / "cache", make_small_recipe())


def make_shard(writer: CacheWriter, index: int) -> None:
    writer.add("train", index, map(make_numbered_record, TASKS[index].numbers))


def finish(writer: CacheWriter, tasks: list[ShardTask] = TASKS) -> None:
    options = ["--run", str(RUN.folder), "--count", str(2 * len(tasks) - 1), "--validation-count", "1"]
    config = load(cache_teacher.Config, "cache_teacher", [Path("configs/tiny.yaml")], options)
    cache_teacher.finish(config, writer, tasks, made_count=1)


def fill_by_two(use: Callable[[str], None]) -> tuple[CacheWriter, CacheWriter]:
    """All shards, made by machines a and b; each has sent its own."""
    use("a")
    a = start()
    make_shard(a, 0)
    Mirror(RUN).send()
    use("b")
    b = start()
    make_shard(b, 1)
    make_shard(b, 2)
    Mirror(RUN).send()
    return a, b


def finish_at(use: Callable[[str], None], machine: str, writer: CacheWriter) -> None:
    use(machine)
    finish(writer)
    Mirror(RUN).send()


@pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "not sent yet"])
def test_who_waited_takes_the_table_of_who_finished(
    store: MemoryStore, use: Callable[[str], None], is_sent: bool
) -> None:
    a, b = fill_by_two(use)
    finish_at(use, "a", a)
    finished, before = store.contents("bucket/run"), len(store.log)
    assert Manifest.parse(finished[MANIFEST], RUN.folder).table
    use("b")
    if not is_sent:
        b.rebuild_manifest()
    finish_at(use, "b", b)
    done = store.log[before:]
    assert not [key for operation, key in done if operation == "get" and key.endswith(".tar")], "no shard is fetched"
    assert store.contents("bucket/run") == finished
    assert not [key for operation, key in done if operation == "put" and "/.claims/" not in key]
    for key in (MANIFEST, COMPLETE, "bucket/run/cache.yaml"):
        assert (RUN.folder / key.removeprefix(f"{RUN.key}/")).read_bytes() == finished[key]
    assert len(Table.open(RUN.folder / "cache")) == 12


def test_the_claim_on_the_table_ends_when_all_is_sent(store: MemoryStore, use: Callable[[str], None]) -> None:
    a, _ = fill_by_two(use)
    use("a")
    finish(a)
    end = store.log.index(("delete", "bucket/run/cache/.claims/table"))
    for key in (MANIFEST, COMPLETE, "bucket/run/cache.yaml", "bucket/run/cache/table.zarr/zarr.json"):
        assert ("put", key) in store.log[:end]
    assert store.log.index(("put", "bucket/run/cache.yaml")) < store.log.index(("put", COMPLETE))


def test_what_a_store_holds_of_a_smaller_cache_is_not_taken(store: MemoryStore, use: Callable[[str], None]) -> None:
    use("a")
    a = start()
    make_shard(a, 0)
    finish(a, TASKS[:1])
    use("b")
    b = start()
    make_shard(b, 1)
    make_shard(b, 2)
    finish_at(use, "b", b)
    assert store.contents()[COMPLETE] == b"6\n"
    assert len(Manifest.parse(store.contents()[MANIFEST], RUN.folder).shards) == 3
    assert is_tabulated(RUN.folder / "cache")
    assert len(Table.open(RUN.folder / "cache")) == 12


def drop_table(store: MemoryStore) -> None:
    bare = Manifest.parse(store.contents()[MANIFEST], RUN.folder).model_copy(update={"table": ()})
    store.put_whole(RUN / "cache/manifest.json", bare.text().encode())


def damage_table(store: MemoryStore) -> None:
    key = max(store.contents("bucket/run/cache/table.zarr/k/c"))
    store.objects[key] = bytes(len(store.contents()[key])), 0.0


def lose_a_column(store: MemoryStore) -> None:
    del store.objects["bucket/run/cache/table.zarr/s/zarr.json"]


def break_manifest(store: MemoryStore) -> None:
    store.objects[MANIFEST] = b"{}", 0.0


def lose_settings(store: MemoryStore) -> None:
    del store.objects["bucket/run/cache.yaml"]


@pytest.mark.parametrize("spoil", [drop_table, damage_table, lose_a_column, break_manifest, lose_settings])
def test_what_is_not_whole_in_the_store_is_made_again(
    store: MemoryStore, use: Callable[[str], None], spoil: Callable[[MemoryStore], None]
) -> None:
    a, b = fill_by_two(use)
    finish_at(use, "a", a)
    finished = store.contents("bucket/run/cache/")
    spoil(store)
    finish_at(use, "b", b)
    assert store.contents("bucket/run/cache/") == finished
    assert "bucket/run/cache.yaml" in store.contents()
    assert is_tabulated(RUN.folder / "cache")


def test_the_same_command_again_changes_nothing(store: MemoryStore, use: Callable[[str], None]) -> None:
    a, _ = fill_by_two(use)
    finish_at(use, "a", a)
    before = store.contents()
    finish_at(use, "a", start())
    assert store.contents() == before
