"""A machine that was cut off and lost its claim sends and deletes nothing more, and its command ends with one line."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from test_mirror import contents, write

from stages.cache.claims import Claims
from stages.system.refusal import Refused
from stages.system.storage import lease, mirror, remote_claim
from stages.system.storage.attached import attach, detach_all
from stages.system.storage.local_copy import delete_stored
from stages.system.storage.locations import Location
from stages.system.storage.mirror import Mirror
from stages.system.storage.object_store import ObjectStore, StoredObject, store_of
from stages.system.storage.remote_claim import RemoteClaim, claim_place

OTHER = json.dumps({"owner": "1-1@elsewhere", "host": "elsewhere", "claim": "other"}).encode()
TAKEN = r"elsewhere works here by now.* - nothing more is sent there; .*start again"


@pytest.fixture
def run(bucket: str) -> Iterator[Location]:
    yield Location("s3", f"{bucket}/run")
    lease._losses.clear()


def take_over(place: Location) -> None:
    store = store_of(place)
    stored = store.info(place)
    assert stored is not None
    assert store.replace(place, OTHER, stored)


def wait_for_loss(claim: RemoteClaim) -> None:
    deadline = time.monotonic() + 30
    while claim.loss is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("claimed", "place", "is_gone"),
    [
        (".claim", "", False),
        (".claim", "distill/checkpoints", True),
        ("distill/.claim", "", True),
        ("distill/.claims/train-000000", "distill", False),
    ],
)
def test_nothing_is_sent_or_deleted_where_another_machine_took_the_claim(
    run: Location, claimed: str, place: str, is_gone: bool
) -> None:
    claim = RemoteClaim(run / claimed)
    assert claim.acquire() is None
    write(run.folder, "distill/checkpoints/log", "distill/checkpoints/rotated")
    folder = Mirror(run / place if place else run)
    folder.send()
    before = contents(run)
    take_over(run / claimed)
    if is_gone:
        store_of(run).delete(run / claimed)
    write(run.folder, "distill/checkpoints/log", content="of this machine")
    (run.folder / "distill/checkpoints/rotated").unlink()
    for _ in range(3):
        with pytest.raises(Refused, match=r"by now.* - nothing more is sent there"):
            folder.send()
    with pytest.raises(Refused, match="nothing more is sent"):
        delete_stored(run.folder / "distill/checkpoints/log")
    claim.release()
    with pytest.raises(Refused, match="nothing more is sent"):
        Mirror(run).send()
    kept = {name: content for name, content in contents(run).items() if "claim" not in name}
    assert kept == {name: content for name, content in before.items() if "claim" not in name}
    assert store_of(run).read(run / claimed) == (None if is_gone else OTHER)


@pytest.mark.parametrize("method", ["read", "replace"])
def test_a_claim_that_is_released_during_a_round_is_not_lost(
    run: Location, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)
    claim, folder = RemoteClaim(run / "cache/.claims/train-000000"), Mirror(run)
    assert claim.acquire() is None
    call = getattr(ObjectStore, method)

    def release_and_call(store: ObjectStore, *arguments: Any) -> Any:
        monkeypatch.setattr(ObjectStore, method, call)
        claim.release()
        return call(store, *arguments)

    monkeypatch.setattr(ObjectStore, method, release_and_call)
    for number in range(3):
        write(run.folder, f"log {number}")
        folder.send()
    assert sorted(contents(run)) == ["log 0", "log 1", "log 2"]


def test_a_claim_on_one_folder_leaves_another_alone(run: Location) -> None:
    claim = RemoteClaim(run / "a/.claim")
    assert claim.acquire() is None
    take_over(run / "a/.claim")
    write(run.folder, "ab/log")
    Mirror(run / "ab").send()
    assert "ab/log" in contents(run)
    claim.release()


def test_a_claim_that_is_taken_in_the_middle_of_a_round_stops_it(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LEASE_SECONDS", 0.0)
    claim = RemoteClaim(run / ".claim")
    assert claim.acquire() is None
    write(run.folder, "a.bin", "manifest.json", "COMPLETE")
    put = ObjectStore.put_whole

    def put_and_take(store: ObjectStore, location: Location, content: Any) -> StoredObject:
        stored = put(store, location, content)
        if location.key.endswith("manifest.json"):
            take_over(run / ".claim")
        return stored

    monkeypatch.setattr(ObjectStore, "put_whole", put_and_take)
    with pytest.raises(Refused, match=TAKEN):
        Mirror(run).send()
    assert sorted(contents(run)) == [".claim", "a.bin", "manifest.json"]
    claim.release()


def test_a_heartbeat_never_takes_a_claim_back(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_claim, "BEAT_SECONDS", 0.05)
    claim, read = RemoteClaim(run / ".claim"), ObjectStore.read
    assert claim.acquire() is None

    def read_and_take(store: ObjectStore, location: Location) -> bytes | None:
        content = read(store, location)
        if content != OTHER:  # another machine takes it between what the heartbeat reads and what it stores
            take_over(location)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "read", read_and_take)
        wait_for_loss(claim)
    claim.release()
    assert store_of(run).read(run / ".claim") == OTHER


def test_a_claim_that_was_renewed_is_not_replaced_by_who_saw_it_stale(run: Location) -> None:
    claim = RemoteClaim(run / ".claim")
    assert claim.acquire() is None
    seen = store_of(run).info(run / ".claim")
    assert seen is not None
    assert claim.renew()
    assert not store_of(run).replace(run / ".claim", OTHER, seen)
    claim.release()
    assert store_of(run).info(run / ".claim") is None


def test_threads_that_renew_a_claim_at_once_keep_it(run: Location) -> None:
    claim = RemoteClaim(run / ".claim")
    assert claim.acquire() is None
    threads = [threading.Thread(target=claim.renew) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert claim.loss is None
    claim.release()


@pytest.mark.parametrize("error", [Refused("out of reach"), OSError(24, "Too many open files"), ValueError("odd")])
def test_a_heartbeat_that_failed_is_tried_again(
    run: Location, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(remote_claim, "BEAT_SECONDS", 0.02)
    calls = threading.Semaphore(0)

    def fail(*_: object) -> None:
        calls.release()
        raise error

    claim = RemoteClaim(run / ".claim")
    assert claim.acquire() is None
    with monkeypatch.context() as patch:
        patch.setattr(remote_claim, "renew", fail)
        for _ in range(3):
            assert calls.acquire(timeout=30)
    claim.release()
    assert store_of(run).read(run / ".claim") is None


def test_a_place_whose_claim_was_lost_ends_with_one_line(run: Location) -> None:
    write(run.folder, "log")
    with pytest.raises(Refused, match=TAKEN) as refusal, claim_place(run.folder, "train in"):
        take_over(run / ".claim")
    assert "\n" not in str(refusal.value)
    assert contents(run) == {".claim": OTHER}


def test_a_process_above_sends_nothing_for_a_claim_that_one_below_lost(
    run: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process knows of its own is not here; the machine's rows are."""
    claim = RemoteClaim(run / "distill/.claim")
    assert claim.acquire() is None
    attach(run)
    take_over(run / "distill/.claim")
    write(run.folder, "distill/log")
    monkeypatch.setattr("stages.system.storage.lease.is_alive", lambda _token: False)
    with pytest.raises(Refused, match=TAKEN):
        detach_all()
    assert contents(run) == {"distill/.claim": OTHER}
    claim.release()


def test_a_new_start_goes_on_from_what_is_there(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=TAKEN), claim_place(run.folder, "train in"):
        take_over(run / ".claim")
    with pytest.raises(Refused, match="one at a time may train in it"), claim_place(run.folder, "train in"):
        """Not reached."""
    store_of(run).delete(run / ".claim")
    with claim_place(run.folder, "train in"):
        write(run.folder, "log")
    assert contents(run) == {"log": b"log"}


@pytest.mark.parametrize("is_alive", [False, None])
def test_a_command_after_one_that_lost_its_claim_and_ended_may_send(
    run: Location, monkeypatch: pytest.MonkeyPatch, is_alive: bool | None
) -> None:
    with pytest.raises(Refused, match=TAKEN), claim_place(run.folder, "train in"):
        take_over(run / ".claim")
    monkeypatch.setattr("stages.system.storage.lease.is_alive", lambda _token: is_alive)
    folder = Mirror(run)
    folder.bring()
    write(run.folder, "samples/0.png")
    folder.send()
    assert "samples/0.png" in contents(run)


def test_a_shard_whose_claim_was_lost_is_not_sent(run: Location) -> None:
    cache = run / "cache"
    with Claims(cache.folder) as claims:
        assert claims.acquire("train-000000")
        write(cache.folder, "data/train-000000.tar", "journal/train-000000.json")
        take_over(cache / ".claims/train-000000")
        with pytest.raises(Refused, match=TAKEN):
            claims.release("train-000000")
    assert contents(cache) == {".claims/train-000000": OTHER}
