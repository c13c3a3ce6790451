"""A working folder and its location: the same on both sides, in an order in which a reader never meets half of it."""

import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from s3_server import FaultyProxy

from stages.system.refusal import Refused
from stages.system.storage import object_store
from stages.system.storage.attached import attach, detach_all
from stages.system.storage.locations import Location, show_locations
from stages.system.storage.mirror import Mirror
from stages.system.storage.object_store import ObjectStore, StoredObject, store_of
from stages.system.storage.remote_claim import RemoteClaim, claim_place

NAMES = [
    "cache/manifest.json", "cache/journal/train-000000.json", "cache/data/train-000000.tar", "cache/COMPLETE",
    "distill/checkpoints/000000008/state.json", "distill/checkpoints/000000008/ema.safetensors", "distill/log.jsonl",
]  # fmt: skip


@pytest.fixture
def run(bucket: str) -> Location:
    return Location("s3", f"{bucket}/runs/a b")


def write(folder: Path, *names: str, content: str = "") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content or name)


def other_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str = "other") -> None:
    monkeypatch.setenv("SOLLUNE_STORAGE", str(tmp_path / name))


def contents(location: Location) -> dict[str, bytes | None]:
    store = store_of(location)
    return {name: store.read(location / name) for name in sorted(store.find(location))}


def test_what_names_others_is_sent_after_them(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    put = ObjectStore.put_whole

    def record(store: ObjectStore, location: Location, content: object) -> object:
        sent.append(str(location).removeprefix(f"{run}/"))
        return put(store, location, content)  # type: ignore[arg-type]

    monkeypatch.setattr(ObjectStore, "put_whole", record)
    write(run.folder, *NAMES, "distill/.hidden.partial", ".claims/x")
    Mirror(run).send()
    assert sorted(sent) == sorted(NAMES)
    for earlier, later in (
        ("cache/data/train-000000.tar", "cache/journal/train-000000.json"),
        ("cache/journal/train-000000.json", "cache/manifest.json"),
        ("cache/manifest.json", "cache/COMPLETE"),
        ("distill/checkpoints/000000008/ema.safetensors", "distill/checkpoints/000000008/state.json"),
    ):
        assert sent.index(earlier) < sent.index(later)
    sent.clear()
    Mirror(run).send()
    assert sent == []


def test_a_manifest_that_is_written_while_files_are_sent_waits_for_its_shards(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run.folder, "cache/data/train-000000.tar", "cache/manifest.json")
    put = ObjectStore.put_whole

    def write_more(store: ObjectStore, location: Location, content: object) -> object:
        if location.key.endswith("train-000000.tar"):
            write(run.folder, "cache/data/train-000001.tar", "cache/manifest.json", content="names both")
        return put(store, location, content)  # type: ignore[arg-type]

    monkeypatch.setattr(ObjectStore, "put_whole", write_more)
    mirror = Mirror(run)
    mirror.send()
    assert contents(run)["cache/manifest.json"] == b"cache/manifest.json"
    mirror.send()
    assert contents(run)["cache/manifest.json"] == b"names both"
    assert "cache/data/train-000001.tar" in contents(run)


def test_another_machine_gets_all_but_shards_and_unfinished_checkpoints(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run.folder, *NAMES, "distill/checkpoints/000000016/ema.safetensors")
    Mirror(run).send()
    other_machine(monkeypatch, tmp_path)
    Mirror(run).bring()
    brought = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    assert brought == set(NAMES) - {"cache/data/train-000000.tar"}


def test_what_is_deleted_here_is_deleted_there_and_the_other_way_round(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run.folder, *NAMES)
    mirror = Mirror(run)
    mirror.send()
    shutil.rmtree(run.folder / "distill/checkpoints/000000008")
    (run.folder / "cache/data/train-000000.tar").unlink()  # to make room
    mirror.send()
    assert sorted(contents(run)) == sorted(NAMES), "more may go with the next look"
    mirror.send()
    assert sorted(contents(run)) == sorted(name for name in NAMES if "000000008" not in name)
    store_of(run).delete(run / "distill/log.jsonl")
    Mirror(run).bring()
    assert not (run.folder / "distill/log.jsonl").exists()


def test_a_working_folder_that_was_removed_is_brought_again(run: Location) -> None:
    write(run.folder, *NAMES)
    Mirror(run).send()
    shutil.rmtree(run.folder)
    mirror = Mirror(run)
    mirror.bring()
    mirror.send()
    assert sorted(contents(run)) == sorted(NAMES)
    assert (run.folder / "distill/log.jsonl").read_text() == "distill/log.jsonl"


def test_the_newer_side_is_taken_and_two_new_ones_are_refused(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run.folder, "log", "other")
    Mirror(run).send()
    store_of(run).put_whole(run / "log", b"from elsewhere")
    write(run.folder, "other", content="changed here")
    Mirror(run).bring()
    assert (run.folder / "log").read_text() == "from elsewhere"
    assert (run.folder / "other").read_text() == "changed here"
    store_of(run).put_whole(run / "other", b"changed there")
    with pytest.raises(Refused, match=r"other: is another file than .* - "):
        Mirror(run).bring()
    assert (run.folder / "other").read_text() == "changed here"
    write(run.folder, "other", content="changed there")
    Mirror(run).bring()  # the same by chance, or sent by a process that was killed before it knew


def test_folders_that_come_and_go_while_files_are_listed_stop_nothing(run: Location, tmp_path: Path) -> None:
    """A table is written into a hidden folder that is renamed when it is whole, and replaced."""
    write(run.folder, "kept")
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            write(run.folder, *(f".table.partial/{column}/c/0" for column in range(20)))
            (run.folder / ".table.partial").rename(run.folder / "table")
            shutil.rmtree(run.folder / "table")

    worker = threading.Thread(target=work)
    worker.start()
    mirror = Mirror(run)
    try:
        for _ in range(300):
            assert "kept" in set(mirror._local_files())
    finally:
        done.set()
        worker.join()


def test_a_folder_that_cannot_be_read_is_not_empty(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run.folder, *NAMES)
    scan = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("cache/data"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    mirror = Mirror(run)
    mirror.send()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", deny)
        with pytest.raises(Refused, match=r"cache/data: cannot be listed .* - "):
            mirror.send()
    assert sorted(contents(run)) == sorted(NAMES)


def test_a_working_folder_that_is_removed_meanwhile_deletes_nothing(run: Location) -> None:
    write(run.folder, *NAMES)
    mirror = Mirror(run)
    mirror.send()
    shutil.rmtree(run.folder)
    with pytest.raises(Refused, match=r"was removed - the same command brings it again"):
        mirror.send()
    assert sorted(contents(run)) == sorted(NAMES)


@pytest.mark.parametrize("name", ["a/../../../x", "a//b", "a\\b", "a\nb"])
def test_an_object_that_can_name_no_file_here_is_refused(
    run: Location, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # A client that is written for the purpose stores such names; this one mends them.
    monkeypatch.setattr(ObjectStore, "find", lambda *_: {name: StoredObject(1, "v", 0.0)})
    with pytest.raises(Refused, match="can name no file here - rename it"):
        Mirror(run).bring()


def test_a_failing_store_loses_no_file_and_ends_in_one_line(
    run: Location, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(object_store, "FIRST_PAUSE_SECONDS", 0.001)
    store_of(run)._files.retries = 1
    attach(run)
    proxy.share, proxy.kinds = 1.0, ("error before",)
    write(run.folder, "log")
    with pytest.raises(Refused, match=r"cannot be reached .* - .*still in ") as refusal:
        detach_all()
    named = re.search(r"still in ([^)]+)\)", show_locations(str(refusal.value)))
    assert named
    assert Path(named[1]) == run.folder
    assert (run.folder / "log").read_text() == "log"
    proxy.share = 0.0
    attach(run)
    detach_all()
    assert contents(run) == {"log": b"log"}


def test_a_location_may_be_a_single_file(run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = run / "model.safetensors"
    write(run.folder, "model.safetensors")
    attach(file)
    detach_all()
    other_machine(monkeypatch, tmp_path)
    attach(file)
    detach_all()
    assert file.folder.read_text() == "model.safetensors"


def test_one_machine_at_a_time_works_in_a_location(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claim_place(run.folder, "train in"):
        write(run.folder, "made")
        other_machine(monkeypatch, tmp_path)
        monkeypatch.setattr("stages.system.storage.remote_claim.is_alive", lambda _token: None)
        monkeypatch.setattr("stages.system.storage.remote_claim.process_token", lambda: "9-9@elsewhere")
        with pytest.raises(Refused, match=r"works here, and one at a time may train in it - "):
            claim_place(run.folder, "train in").__enter__()
        monkeypatch.undo()


@pytest.mark.parametrize(("alive", "age", "is_taken"), [(False, 0, True), (None, 0, False), (None, 500, True)])
def test_a_claim_is_taken_over_when_its_owner_ended(
    run: Location, monkeypatch: pytest.MonkeyPatch, alive: bool | None, age: float, is_taken: bool
) -> None:
    place = run / ".claim"
    store_of(run).put_whole(place, b'{"owner": "1-1@elsewhere", "host": "elsewhere"}')
    monkeypatch.setattr("stages.system.storage.remote_claim.is_alive", lambda _token: alive)
    monkeypatch.setattr("stages.system.storage.remote_claim.STALE_SECONDS", 120 - age)
    claim = RemoteClaim(place)
    assert claim.acquire() == (None if is_taken else "elsewhere")
    if is_taken:
        claim.release()
        assert store_of(run).read(place) is None
