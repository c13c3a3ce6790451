"""Threads, and commands one after the other, in one working folder: none takes for old or gone what another one did."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_mirror import contents, other_machine, write

from stages.system.refusal import Refused
from stages.system.storage.local_copy import drop_copy, hold_copy
from stages.system.storage.locations import Location
from stages.system.storage.mirror import Mirror, bring_folder, send_folder
from stages.system.storage.object_store import ObjectStore, store_of

CHECKPOINT = "distill/checkpoints/000000008"
PARTS = ("ema.safetensors", "optimizer.pt", "state.json", "student.safetensors")
SHARD = "cache/data/train-000000.tar"


class Killed(BaseException):
    """In the place of a signal that ends the process."""


@pytest.fixture
def run(bucket: str) -> Location:
    return Location("s3", f"{bucket}/run")


def here(run: Location) -> list[str]:
    return sorted(path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file())


def once(monkeypatch: pytest.MonkeyPatch, method: str, action: Callable[[], None], *, before: bool = False) -> None:
    """Let an action happen at the next call of a store's method: after what it sees, or before it."""
    call = getattr(ObjectStore, method)

    def call_and_act(store: ObjectStore, *arguments: object) -> object:
        monkeypatch.setattr(ObjectStore, method, call)
        if before:
            action()
        result = call(store, *arguments)
        if not before:
            action()
        return result

    monkeypatch.setattr(ObjectStore, method, call_and_act)


@pytest.mark.parametrize("error", [Killed, Refused], ids=["killed", "out of reach"])
@pytest.mark.parametrize("broken", PARTS)
def test_a_checkpoint_whose_sending_broke_off_stays_and_is_sent(
    run: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: type[BaseException]
) -> None:
    names = sorted(f"{CHECKPOINT}/{part}" for part in PARTS)
    write(run.folder, *names)
    put = ObjectStore.put_whole

    def break_off(store: ObjectStore, location: Location, content: object) -> object:
        if location.key.endswith(broken):
            raise error("cannot be reached")
        return put(store, location, content)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_whole", break_off)
        with pytest.raises(error):
            Mirror(run).send()
    mirror = Mirror(run)
    mirror.bring()
    assert here(run) == names
    mirror.send()
    assert contents(run) == {name: name.encode() for name in names}
    other_machine(monkeypatch, tmp_path)
    Mirror(run).bring()
    assert here(run) == names


@pytest.mark.parametrize("there", [None, b"of another machine, which was lost"])
def test_a_part_of_an_unfinished_checkpoint_that_is_another_there_is_sent_again(
    run: Location, there: bytes | None
) -> None:
    names = sorted(f"{CHECKPOINT}/{part}" for part in PARTS)
    write(run.folder, *names[:2])
    Mirror(run).send()
    write(run.folder, *names[2:])
    if there is None:
        store_of(run).delete(run / names[0])
    else:
        store_of(run).put_whole(run / names[0], there)
        store_of(run).put_whole(run / names[3], there)
    mirror = Mirror(run)
    mirror.bring()
    mirror.send()
    assert contents(run) == {name: name.encode() for name in names}


def test_a_checkpoint_that_another_machine_began_to_delete_goes_here_too(run: Location) -> None:
    write(run.folder, "log", *(f"{CHECKPOINT}/{part}" for part in PARTS))
    Mirror(run).send()
    store_of(run).delete(run / CHECKPOINT / "state.json")
    Mirror(run).bring()
    assert here(run) == ["log"]


def test_what_is_sent_while_a_folder_is_brought_stays(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run.folder, "cache/manifest.json", "cache/journal/a.json")
    Mirror(run).send()

    def send_more() -> None:
        write(run.folder, SHARD, "cache/journal/b.json")
        write(run.folder, "cache/journal/a.json", content="sent again")
        send_folder(run.folder / "cache")

    once(monkeypatch, "find", send_more)
    bring_folder(run.folder / "cache/journal")
    assert here(run) == [
        "cache/data/train-000000.tar",
        "cache/journal/a.json",
        "cache/journal/b.json",
        "cache/manifest.json",
    ]
    assert (run.folder / "cache/journal/a.json").read_text() == "sent again"
    Mirror(run).bring()
    assert sorted(contents(run)) == here(run)


def test_a_log_that_grows_while_it_is_sent_is_no_conflict(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run.folder, "distill/log.jsonl", content="1\n")
    Mirror(run).send()

    def send_and_grow() -> None:
        write(run.folder, "distill/log.jsonl", content="1\n2\n")
        send_folder(run.folder)
        write(run.folder, "distill/log.jsonl", content="1\n2\n3\n")

    once(monkeypatch, "find", send_and_grow, before=True)
    bring_folder(run.folder / "distill")
    assert (run.folder / "distill/log.jsonl").read_text() == "1\n2\n3\n"


@pytest.mark.parametrize("error", [Killed, Refused], ids=["killed", "out of reach"])
@pytest.mark.parametrize("arrives", [True, False])
def test_a_log_that_grew_while_its_sending_broke_off_is_no_conflict(
    run: Location, monkeypatch: pytest.MonkeyPatch, arrives: bool, error: type[BaseException]
) -> None:
    log = run.folder / "distill/log.jsonl"
    write(run.folder, "distill/log.jsonl", content="1\n")
    Mirror(run).send()
    put = ObjectStore.put_whole

    def break_off(store: ObjectStore, location: Location, content: object) -> object:
        if arrives:
            put(store, location, content)  # type: ignore[arg-type]
        write(run.folder, "distill/log.jsonl", content="1\n2\n3\n")
        raise error("the answer was lost")

    write(run.folder, "distill/log.jsonl", content="1\n2\n")
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_whole", break_off)
        with pytest.raises(error):
            Mirror(run).send()
    mirror = Mirror(run)
    mirror.bring()
    assert log.read_text() == "1\n2\n3\n"
    mirror.send()
    assert contents(run) == {"distill/log.jsonl": b"1\n2\n3\n"}
    log.write_text("changed here")
    store_of(run).put_whole(run / "distill/log.jsonl", b"1\n2\n")
    with pytest.raises(Refused, match="neither is a copy of the other"):
        Mirror(run).bring()


def test_a_file_that_is_renewed_from_there_is_not_deleted_there(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run.folder, "distill/log.jsonl", "kept")
    mirror = Mirror(run)
    mirror.send()
    store_of(run).put_whole(run / "distill/log.jsonl", b"newer")
    rounds = 2

    def send() -> None:
        for _ in range(rounds):
            mirror.send()

    once(monkeypatch, "get_whole", send, before=True)
    bring_folder(run.folder / "distill")
    mirror.send()
    assert contents(run) == {"distill/log.jsonl": b"newer", "kept": b"kept"}


@pytest.fixture
def fetchable(run: Location) -> Path:
    """A shard that is in the bucket alone."""
    write(run.folder, "cache/manifest.json", SHARD)
    Mirror(run).send()
    (run.folder / SHARD).unlink()
    Mirror(run).bring()
    return run.folder / SHARD


def test_a_shard_that_is_fetched_during_a_round_is_not_sent_back(
    run: Location, fetchable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(run)
    mirror.bring()
    put: list[str] = []
    monkeypatch.setattr(ObjectStore, "put_whole", lambda _store, location, _content: put.append(str(location)))
    list_here, rounds = mirror._local_files, iter((True, False, False, False))

    def fetch_and_list() -> object:
        if next(rounds):
            hold_copy(fetchable, len(SHARD))
        return list_here()

    monkeypatch.setattr(mirror, "_local_files", fetch_and_list)
    mirror.send()
    assert fetchable.read_text() == SHARD
    assert put == []


def test_a_shard_is_never_here_without_the_row_of_a_copy(
    run: Location, fetchable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []
    monkeypatch.setattr(ObjectStore, "put_whole", lambda _store, location, _content: put.append(str(location)))
    rename, unlink = Path.replace, Path.unlink

    def rename_and_send(path: Path, target: Path) -> Path:
        result = rename(path, target)
        Mirror(run).send()
        return result

    def send_and_unlink(path: Path, missing_ok: bool = False) -> None:
        if path == fetchable:
            Mirror(run).send()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "replace", rename_and_send)
    hold_copy(fetchable, len(SHARD))
    monkeypatch.setattr(Path, "unlink", send_and_unlink)
    drop_copy(fetchable)
    assert not fetchable.exists()
    assert put == []


def test_a_shard_that_is_fetched_while_the_folder_is_brought_counts_as_a_copy(
    run: Location, fetchable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, "find", lambda: hold_copy(fetchable, len(SHARD)))  # type: ignore[arg-type, return-value]
    Mirror(run).bring()
    put: list[str] = []
    monkeypatch.setattr(ObjectStore, "put_whole", lambda _store, location, _content: put.append(str(location)))
    Mirror(run).send()
    assert put == []


def test_what_a_command_removed_is_not_brought_again_by_itself(run: Location) -> None:
    write(run.folder, "cache/journal/a.json", "cache/journal/b.json")
    Mirror(run).send()
    (run.folder / "cache/journal/a.json").unlink()
    bring_folder(run.folder / "cache/journal", again=False)
    assert here(run) == ["cache/journal/b.json"]
    shutil.rmtree(run.folder)
    Mirror(run).bring()
    assert here(run) == ["cache/journal/a.json", "cache/journal/b.json"]
