"""The thread that sends: no error ends it, and what is removed around it deletes nothing there."""

import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_mirror import NAMES, contents, write

from stages.system.refusal import Refused
from stages.system.storage import mirror as mirrors
from stages.system.storage.attached import attach, attached_locations, detach_all
from stages.system.storage.locations import Location
from stages.system.storage.mirror import Mirror
from stages.system.storage.object_store import store_of

REMOVED = r"was removed - the same command brings it again"


@pytest.fixture
def run(bucket: str) -> Location:
    return Location("s3", f"{bucket}/run")


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


FAULTS = [
    (
        mirrors,
        "folder_lock",
        OSError(24, "Too many open files", "lock"),
        r"cannot be sent \(lock: Too many .*ulimit -n",
    ),
    (Path, "read_bytes", PermissionError(13, "Permission denied", "state.json"), r"state.json: Permission denied\) - "),
    (mirrors, "make_room", OSError(5, "Input/output error"), r"Input/output error\) - check the disk"),
    (Mirror, "_changes", ValueError("of a kind that nobody foresaw"), "ValueError: of a kind that nobody foresaw"),
]


@pytest.mark.parametrize(("owner", "name", "error", "line"), FAULTS, ids=[name for _, name, *_ in FAULTS])
def test_no_error_ends_the_sending(
    run: Location,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: object,
    name: str,
    error: Exception,
    line: str,
) -> None:
    monkeypatch.setattr(mirrors, "POLL_SECONDS", 0.02)
    mirror = Mirror(run)
    mirror.bring()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(error))
        write(run.folder, "distill/checkpoints/000000008/state.json")
        mirror.start()
        wait_until(lambda: mirror.problem is not None)
    wait_until(lambda: mirror.problem is None)
    assert "distill/checkpoints/000000008/state.json" in contents(run)
    mirror.close()
    assert re.search(rf"storage: .*{line}", capsys.readouterr().err)


@pytest.mark.parametrize("error", [Refused("out of reach"), ValueError("odd")])
def test_one_location_that_fails_leaves_the_others_to_be_sent(
    run: Location, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    for name in "abc":
        attach(run / name)
        write((run / name).folder, "log")
    close = Mirror.close

    def fail_but_a(mirror: Mirror) -> None:
        if mirror.location == run / "a":
            return close(mirror)
        mirror._ended.set()
        raise error

    monkeypatch.setattr(Mirror, "close", fail_but_a)
    with pytest.raises(type(error), match=str(error)):
        detach_all()
    assert "a/log" in contents(run)
    assert str(error) in capsys.readouterr().err, "the second one"


def test_the_error_of_a_command_stays_the_one_that_is_raised(
    run: Location, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Mirror, "close", raising(OSError(5, "Input/output error")))
    attach(run)
    command = attached_locations()
    command.__enter__()
    error = KeyError("of the command")
    assert not command.__exit__(KeyError, error, None)
    assert "storage: OSError" in capsys.readouterr().err


def test_a_folder_that_is_removed_bit_by_bit_deletes_nothing(run: Location) -> None:
    write(run.folder, *NAMES)
    mirror = Mirror(run)
    mirror.send()
    for name in NAMES[:-1]:
        (run.folder / name).unlink()
        mirror.send()
    shutil.rmtree(run.folder)
    with pytest.raises(Refused, match=REMOVED):
        mirror.send()
    assert sorted(contents(run)) == sorted(NAMES)


@pytest.mark.parametrize("how", ["made again", "emptied"])
def test_a_folder_that_is_removed_and_written_to_again_deletes_nothing(run: Location, how: str) -> None:
    write(run.folder, *NAMES)
    mirror = Mirror(run)
    mirror.bring()
    mirror.send()
    if how == "made again":
        run.folder.rename(run.folder.with_name("aside"))
        write(run.folder, *NAMES[:2])
    else:
        shutil.rmtree(run.folder / "cache")
        shutil.rmtree(run.folder / "distill")
    write(run.folder, "distill/new")
    for _ in range(3):
        with pytest.raises(Refused, match=REMOVED):
            mirror.send()
    assert sorted(contents(run)) == sorted(NAMES)


def test_a_folder_may_be_replaced_by_a_whole_one(run: Location) -> None:
    write(run.folder, *NAMES)
    mirror = Mirror(run)
    mirror.send()
    run.folder.rename(run.folder.with_name("aside"))
    write(run.folder, *NAMES, "new")
    mirror.send()
    assert sorted(contents(run)) == sorted([*NAMES, "new"])


def test_what_is_deleted_at_the_end_is_deleted_there(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "POLL_SECONDS", 0.05)
    write(run.folder, *NAMES)
    mirror = Mirror(run)
    mirror.send()
    shutil.rmtree(run.folder / "distill/checkpoints/000000008")
    assert mirror._descriptor is not None
    mirror.close()
    assert sorted(contents(run)) == [name for name in sorted(NAMES) if "000000008" not in name]
    assert mirror._descriptor is None


def test_rounds_of_two_threads_send_a_file_once(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run.folder, *NAMES)
    put: list[str] = []
    store = type(store_of(run))
    put_whole = store.put_whole
    monkeypatch.setattr(
        store, "put_whole", lambda one, location, content: put.append(location.key) or put_whole(one, location, content)
    )
    threads = [threading.Thread(target=Mirror(place).send) for place in (run, run / "cache", run / "distill")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(put) == len(set(put)) == len(NAMES)
