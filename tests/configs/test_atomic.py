"""Laws of files that appear whole or not at all: what the system raises is one line with the way out."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from stages.system.atomic import atomic_path, atomic_write, fsync_folder
from stages.system.disk import refuse_unwritable, refuse_write_errors, system_error
from stages.system.refusal import Refused

NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
    *(errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE),
)


def raise_os_error(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "runs/.a.json.1@here.partial")

    return fail


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("act", ["mkdir", "write_bytes", "replace"])
def test_each_error_of_the_system_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, act: str
) -> None:
    monkeypatch.setattr(Path, act, raise_os_error(number))
    path = tmp_path / "a.json"
    with pytest.raises(Refused) as refusal:
        atomic_write(path, "content")
    assert str(refusal.value).startswith(f"{path}: cannot be written ({os.strerror(number)}) - ")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_clear_away_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", raise_os_error(errno.EROFS))
    monkeypatch.setattr(Path, "unlink", raise_os_error(errno.EIO))
    with pytest.raises(Refused, match="Read-only file system"):
        atomic_write(tmp_path / "a.json", "content")


def test_a_failure_of_the_writers_own_passes(tmp_path: Path) -> None:
    def half(error: Exception) -> None:
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(KeyError):
        half(KeyError("x"))
    with pytest.raises(BrokenPipeError):
        half(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "Is a directory"),
        ("file/below", "Not a directory"),
        ("file/far/below", "Not a directory"),
        ("nowhere/below", "No such file or directory"),
        ("circle/below", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
        (f"{'x' * 300}/below", "File name too long"),
        ("pipe", "a device or a pipe"),
    ],
)
def test_what_stands_in_the_way_is_refused_and_left(tmp_path: Path, name: str, reason: str, early: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("is/not/there")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Refused, match=reason) as refusal:
        refuse_unwritable(tmp_path / name) if early else atomic_write(tmp_path / name, "content")
    assert str(refusal.value).startswith(f"{tmp_path / name}: cannot be written (")
    assert " - " in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_what_can_be_written_is_not_refused_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("new", "far/below/new", "link/new"):
        refuse_unwritable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "real"]


def test_a_link_of_the_name_is_replaced_and_what_it_led_to_is_left(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "a").symlink_to("other")
    atomic_write(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"
    assert (tmp_path / "other").read_text() == "mine"


def test_a_file_system_that_cannot_make_folders_durable_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raise_os_error(errno.EINVAL))
    fsync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", raise_os_error(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        fsync_folder(tmp_path)


def test_the_systems_error_is_recognised_behind_the_messages_of_libraries(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"a: cannot be written \(Is a directory\)"), refuse_write_errors(tmp_path / "a"):
        save_file({"x": zeros(1)}, tmp_path)
    hidden = RuntimeError("PytorchStreamWriter failed writing file data/0")
    hidden.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(Refused, match=r"a: cannot be written \(No space left on device\)"),
        refuse_write_errors(tmp_path / "a"),
    ):
        raise hidden
    assert system_error(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert system_error(OSError("a library's own words")) is None
    assert system_error(RuntimeError("shapes differ")) is None
