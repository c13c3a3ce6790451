"""Uploads against a hub that is a folder, which fails, changes bytes and hangs on purpose."""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import LFSFileInfo, RepoFile

from stages.hub import publish_run as publish
from stages.hub import uploader as hub_module
from stages.hub.repository import Repository, fetch_newest_checkpoint, git_blob_id
from stages.hub.snapshot import Staging
from stages.hub.uploader import HubConfig, Uploader, make_uploader
from stages.system.refusal import Refused
from stages.train.checkpoint_store import CheckpointMeta, fault_of

LFS = (".safetensors", ".pt")


def refusal(status: int) -> HfHubHTTPError:
    request = httpx2.Request("POST", "http://hub.invalid/")
    return HfHubHTTPError(f"{status} from the hub", response=httpx2.Response(status, request=request))


class FolderHub:
    """The client's methods that the project calls, over a dictionary of paths; `failure` is called before most."""

    token = "a token"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, str] = {}
        self.commits: list[str] = []
        self.private: bool | None = None
        self.tags: list[str] = []
        self.failure: Callable[[str], None] = lambda method: None
        self.garble: Callable[[str, bytes], bytes] = lambda path, content: content

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.failure("create_repo")
        self.private = private if self.private is None else self.private

    def auth_check(self, name: str, *, write: bool) -> None:
        self.failure("auth_check")

    def repo_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def preupload_lfs_files(self, name: str, additions: list[CommitOperationAdd], *, free_memory: bool) -> None:
        self.failure("preupload_lfs_files")
        for addition in additions:
            if addition.path_in_repo.endswith(LFS):
                content = Path(addition.path_or_fileobj).read_bytes()
                self.stored[hashlib.sha256(content).hexdigest()] = addition.path_in_repo

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> SimpleNamespace:
        self.failure("create_commit")
        files = dict(self.files)
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                files = {p: c for p, c in files.items() if not p.startswith(operation.path_in_repo)}
            else:
                content = Path(operation.path_or_fileobj).read_bytes()
                files[operation.path_in_repo] = self.garble(operation.path_in_repo, content)
        self.files = files
        self.commits.append(commit_message)
        return SimpleNamespace(oid=str(len(self.commits)))

    def list_repo_tree(self, name: str, *, recursive: bool) -> Iterator[RepoFile]:
        self.failure("list_repo_tree")
        yield from (self._listed(path) for path in self.files)

    def get_paths_info(self, name: str, paths: list[str], *, revision: str) -> list[RepoFile]:
        self.failure("get_paths_info")
        assert revision == str(len(self.commits))
        return [self._listed(path) for path in paths if path in self.files]

    def list_repo_refs(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(branches=["main"], tags=self.tags)

    def list_lfs_files(self, name: str) -> Iterator[LFSFileInfo]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        for sha256, path in self.stored.items():
            yield LFSFileInfo(fileOid=sha256, filename=path, oid=sha256, pushedAt=now, size=1)

    def permanently_delete_lfs_files(self, name: str, files: list[LFSFileInfo], *, rewrite_history: bool) -> None:
        assert not rewrite_history
        for file in files:
            del self.stored[file.file_oid]

    def hf_hub_download(self, name: str, path: str, *, local_dir: Path) -> str:
        self.failure("hf_hub_download")
        target = local_dir / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.files[path])
        return str(target)

    def _listed(self, path: str) -> RepoFile:
        content = self.files[path]
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"size": len(content), "oid": sha256, "pointerSize": 1} if path.endswith(LFS) else None
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        return RepoFile(path=path, size=len(content), oid=blob, lfs=lfs)


class Times:
    """A failure at the first `n` calls of a method."""

    def __init__(self, method: str, n: int, error: Exception) -> None:
        self.method, self.left, self.error = method, n, error

    def __call__(self, method: str) -> None:
        if method == self.method and self.left > 0:
            self.left -= 1
            raise self.error


class Hang:
    """A hub that does not answer until `go_on` is set."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, method: str) -> None:
        if method == "create_commit":
            self.begun.set()
            assert self.go_on.wait(20)


@pytest.fixture
def hub() -> FolderHub:
    return FolderHub()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def uploader(hub: FolderHub, tmp_path: Path, pauses: list[float]) -> Iterator[Uploader]:
    config = HubConfig(repo="org/name", wait_minutes=0.3)
    uploader = Uploader(
        config, tmp_path, Repository("org/name", True, hub), lambda _wake, seconds: pauses.append(seconds)
    )
    yield uploader
    uploader.close()


def checkpoint(run: Path, samples: int) -> Path:
    """A checkpoint's folder as training leaves it, with other content in its place."""
    folder = run / "checkpoints" / f"{samples:09d}"
    folder.mkdir(parents=True)
    files = {name: f"{name} {samples}".encode() for name in ("student.safetensors", "optimizer.pt")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    CheckpointMeta(samples, None, {}, hashes).write(folder)
    return folder


def export(run: Path) -> Path:
    for name in ("diffusers/README.md", "diffusers/unet/model.safetensors", "teacher-flow.safetensors"):
        path = run / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return run / "export"


def content(folder: Path) -> dict[str, bytes]:
    return {f"checkpoints/{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}


def move_to_hub(hub: FolderHub, folder: Path) -> None:
    """Move a checkpoint to the hub."""
    hub.files |= content(folder)
    shutil.rmtree(folder)


def test_a_checkpoint_arrives_under_its_samples_with_every_bit(hub, uploader, tmp_path):
    folder = checkpoint(tmp_path, 8)
    uploader.send_checkpoint(folder)
    assert uploader.close()
    assert hub.files == content(folder)
    assert uploader.warning() is None
    assert uploader.metrics() == {"hub": {"waiting": 0, "failures": 0, "samples": 8}}
    assert not list(tmp_path.glob(".hub*"))


def test_an_export_lies_at_the_root_with_its_diffusers_folder_unfolded(hub, uploader, tmp_path):
    uploader.send_export(export(tmp_path))
    assert uploader.close()
    assert set(hub.files) == {"README.md", "unet/model.safetensors", "teacher-flow.safetensors"}


@pytest.mark.parametrize("method", ["preupload_lfs_files", "create_commit", "get_paths_info"])
def test_a_connection_that_dies_is_retried_after_longer_and_longer_pauses(hub, uploader, tmp_path, pauses, method):
    hub.failure = Times(method, 3, ConnectionResetError("the line is dead"))
    folder = checkpoint(tmp_path, 8)
    uploader.send_checkpoint(folder)
    assert uploader.close()
    assert pauses == [15, 30, 60]
    assert hub.files == content(folder)
    assert uploader.warning() is None


def test_nothing_of_a_checkpoint_is_visible_on_the_hub_before_all_of_it_is_there(hub, uploader, tmp_path):
    listings: list[set[str]] = []

    def look(method: str) -> None:
        listings.append(set(hub.files))

    hub.failure = look
    folder = checkpoint(tmp_path, 8)
    uploader.send_checkpoint(folder)
    uploader.close()
    assert set() in listings
    assert all(files in (set(), set(content(folder))) for files in listings)


def test_the_longest_pause_has_a_limit(hub, uploader, tmp_path, pauses):
    hub.failure = Times("create_commit", 20, ConnectionResetError())
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    assert uploader.close()
    assert max(pauses) == 900
    assert pauses == sorted(pauses)


@pytest.mark.parametrize("file", ["student.safetensors", "state.json"])
def test_a_wrong_byte_on_the_hub_is_noticed_and_repaired(hub, tmp_path, file):
    damaged = iter([True, True, False])
    hub.garble = lambda path, sent: sent[:-1] + b"?" if path.endswith(file) and next(damaged) else sent
    warnings: list[str | None] = []
    repository = Repository("org/name", True, hub)
    uploader = Uploader(HubConfig(), tmp_path, repository, lambda *_: warnings.append(uploader.warning()))
    folder = checkpoint(tmp_path, 8)
    uploader.send_checkpoint(folder)
    assert uploader.close()
    assert [f"checkpoints/000000008/{file} has the hash" in str(warning) for warning in warnings] == [True, True]
    assert hub.files == content(folder)
    assert uploader.warning() is None


def test_a_file_that_the_hub_ignored_is_noticed(hub, uploader, tmp_path):
    hub.failure = lambda method: (
        hub.files.pop("checkpoints/000000008/optimizer.pt") if method == "get_paths_info" else 0
    )
    with pytest.raises(RuntimeError, match=r"optimizer.pt is not in the repository"):
        uploader.repository.upload(Staging(tmp_path).snapshot_checkpoint(checkpoint(tmp_path, 8)))


def test_a_failure_is_shown_until_it_is_repaired_and_training_never_waits(hub, tmp_path):
    hub.failure = Times("create_commit", 10**9, refusal(507))
    failed, repaired = threading.Event(), threading.Event()

    def pause(_wake: threading.Event, _seconds: float) -> None:
        failed.set()
        assert repaired.wait(20)

    uploader = Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub), pause)
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    assert failed.wait(20)
    assert "checkpoints/000000008 has not arrived (HfHubHTTPError: 507 from the hub), failure 1" in uploader.warning()
    uploader.send_checkpoint(checkpoint(tmp_path, 16))
    assert uploader.metrics() == {"hub": {"waiting": 1, "failures": 1, "samples": 0}}
    hub.failure = lambda method: None
    repaired.set()
    assert uploader.close()
    assert uploader.warning() is None
    assert uploader.metrics()["hub"] == {"waiting": 0, "failures": 0, "samples": 16}
    assert hub.commits == ["Add checkpoints/000000016"]


def test_an_export_that_cannot_arrive_holds_up_no_checkpoint_and_stays_in_the_warning(hub, tmp_path):
    failed, more, arrived, looked = (threading.Event() for _ in range(4))

    def refuse(path: str, sent: bytes) -> bytes:
        if path == "README.md":
            raise ValueError("Invalid metadata in README.md")
        return sent

    def pause(_wake: threading.Event, _seconds: float) -> None:
        failed.set()
        assert more.wait(20)
        if arrived.is_set():
            assert looked.wait(20)
            hub.garble = lambda path, sent: sent

    hub.garble = refuse
    hub.failure = lambda method: arrived.set() if method == "list_repo_tree" else None
    uploader = Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub), pause)
    uploader.send_export(export(tmp_path))
    assert failed.wait(20)
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    more.set()
    assert arrived.wait(20)
    assert "export has not arrived (ValueError: Invalid metadata in README.md)" in uploader.warning()
    looked.set()
    assert uploader.close()
    assert hub.commits == ["Add checkpoints/000000008", "Add export"]
    assert uploader.warning() is None


def test_a_waiting_checkpoint_is_dropped_for_a_newer_one_and_an_export_never_is(hub, uploader, tmp_path):
    hub.failure = hang = Hang()
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    assert hang.begun.wait(20)
    uploader.send_checkpoint(checkpoint(tmp_path, 16))
    uploader.send_export(export(tmp_path))
    uploader.send_checkpoint(checkpoint(tmp_path, 24))
    assert uploader.metrics()["hub"]["waiting"] == 3
    assert {path.name for path in tmp_path.glob(".hub*/*/0*")} == {"000000008", "000000024"}
    hang.go_on.set()
    assert uploader.close()
    assert hub.commits == ["Add checkpoints/000000008", "Add export", "Add checkpoints/000000024"]


def test_a_checkpoint_that_is_pruned_while_it_waits_arrives_whole(hub, uploader, tmp_path):
    hub.failure = hang = Hang()
    expected = {}
    for samples in (8, 16):
        folder = checkpoint(tmp_path, samples)
        expected |= content(folder)
        uploader.send_checkpoint(folder)
        shutil.rmtree(folder)
    hang.go_on.set()
    assert hang.begun.wait(20)
    assert uploader.close()
    assert hub.files.items() <= expected.items()
    assert "checkpoints/000000016/state.json" in hub.files


def test_a_disk_without_hard_links_gets_a_copy(hub, uploader, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = checkpoint(tmp_path, 8)
    uploader.send_checkpoint(folder)
    expected = content(folder)
    shutil.rmtree(folder)
    assert uploader.close()
    assert hub.files == expected


def test_a_snapshot_that_cannot_be_made_is_shown_and_ends_nothing(uploader, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = checkpoint(tmp_path, 8)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        patched.setattr(shutil, "copyfile", full)
        uploader.send_checkpoint(folder)
    assert "no snapshot of 000000008 could be made" in uploader.warning()
    uploader.send_checkpoint(folder)
    assert uploader.close()
    assert uploader.warning() is None


def test_a_checkpoint_that_was_damaged_here_is_not_sent(hub, uploader, tmp_path, capsys):
    folder = checkpoint(tmp_path, 8)
    (folder / "optimizer.pt").write_bytes(b"?")
    uploader.send_checkpoint(folder)
    uploader.close()
    assert hub.files == {}
    assert "damaged here before it was sent (optimizer.pt is not the file that was written)" in uploader.warning()
    assert "sollune publish" in capsys.readouterr().out


def test_the_repository_keeps_the_newest_checkpoints_and_their_storage_only(hub, tmp_path):
    for samples in (8, 16, 24):
        with Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub)) as uploader:
            uploader.send_checkpoint(checkpoint(tmp_path, samples))
    assert {path.split("/")[1] for path in hub.files} == {"000000016", "000000024"}
    assert {path.split("/")[1] for path in hub.stored.values()} == {"000000016", "000000024"}
    assert hub.commits[-2:] == ["Add checkpoints/000000024", "Remove checkpoints/000000008"]


def clear(hub: FolderHub, tmp_path: Path, newest: int, *tags: str) -> set[str]:
    repository = Repository("org/name", True, hub)
    for samples in (8, 16, 24, 96):
        repository.upload(Staging(tmp_path).snapshot_checkpoint(checkpoint(tmp_path, samples)))
    hub.tags = list(tags)
    repository.remove_old_checkpoints(newest, keep=1)
    return {path.split("/")[1] for path in hub.files}


def test_later_checkpoints_of_another_attempt_are_kept(hub, tmp_path):
    assert clear(hub, tmp_path, 24) == {"000000024", "000000096"}


def test_what_a_tag_may_hold_keeps_its_content(hub, tmp_path):
    assert clear(hub, tmp_path, 24, "v1") == {"000000024", "000000096"}
    assert len(hub.stored) == 8


def test_content_that_another_checkpoint_shares_is_not_taken_away(hub, tmp_path):
    shared = hashlib.sha256(b"the same").hexdigest()
    hub.files["unet/model.safetensors"] = b"the same"
    hub.stored[shared] = "checkpoints/000000008/student.safetensors"
    clear(hub, tmp_path, 24)
    assert shared in hub.stored


def test_a_removal_that_fails_is_shown_and_costs_no_checkpoint(hub, uploader, tmp_path):
    hub.failure = Times("list_repo_tree", 1, refusal(500))
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    assert uploader.close()
    assert "superseded checkpoints could not be removed" in uploader.warning()
    assert "checkpoints/000000008/state.json" in hub.files


def test_the_newest_checkpoint_is_fetched_from_the_hub(hub, uploader, tmp_path, capsys):
    for samples in (8, 16):
        move_to_hub(hub, checkpoint(tmp_path, samples))
    expected = {path: sent for path, sent in hub.files.items() if "000000016" in path}
    fetched = uploader.fetch_checkpoint(tmp_path / "checkpoints")
    assert fetched == tmp_path / "checkpoints" / "000000016"
    assert content(fetched) == expected
    assert fault_of(fetched) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000016"]


def test_a_damaged_checkpoint_on_the_hub_is_passed_over_with_a_message(hub, uploader, tmp_path, capsys):
    for samples in (8, 16):
        move_to_hub(hub, checkpoint(tmp_path, samples))
    hub.files["checkpoints/000000016/optimizer.pt"] = b"?"
    assert uploader.fetch_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "000000008"
    assert "000000016 passed over, optimizer.pt is not the file that was written" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000008"]


def test_an_empty_repository_brings_nothing(uploader, tmp_path, capsys):
    assert uploader.fetch_checkpoint(tmp_path / "checkpoints") is None
    assert "no whole checkpoint there" in capsys.readouterr().out


def test_a_download_that_dies_is_retried(hub, tmp_path):
    move_to_hub(hub, checkpoint(tmp_path, 8))
    hub.failure = Times("hf_hub_download", 2, ConnectionResetError())
    slept: list[float] = []
    fetched = fetch_newest_checkpoint(Repository("org/name", True, hub), tmp_path / "checkpoints", slept.append)
    assert fault_of(fetched) is None
    assert slept == [10, 20]


def test_a_hub_out_of_reach_is_no_reason_to_begin_a_run_anew(hub, tmp_path):
    hub.failure = Times("list_repo_tree", 10**9, ConnectionResetError("the line is dead"))
    with pytest.raises(Refused, match=r"no checkpoint can be fetched \(ConnectionResetError: the line is dead\)"):
        fetch_newest_checkpoint(Repository("org/name", True, hub), tmp_path / "checkpoints", lambda _: None)


def test_without_a_token_a_run_is_refused_at_its_start(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "token", None, raising=False)
    monkeypatch.setattr("stages.hub.repository.get_token", lambda: None)
    with pytest.raises(Refused, match="no token found"):
        Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub))


@pytest.mark.parametrize("method", ["create_repo", "auth_check"])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_without_the_right_to_write_a_run_is_refused_at_its_start(hub, tmp_path, method, status):
    hub.failure = Times(method, 1, refusal(status))
    with pytest.raises(Refused, match=f"may not write there .{status} from the hub"):
        Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub))


def test_a_public_repository_is_refused_where_a_private_one_is_wanted(hub, tmp_path):
    hub.private = False
    with pytest.raises(Refused, match="is public"):
        Repository("org/name", True, hub).open()
    Repository("org/name", False, hub).open()


def test_a_hub_out_of_reach_at_the_start_ends_no_run_and_is_retried(hub, tmp_path):
    hub.failure = Times("create_repo", 1, refusal(503))
    uploader = Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub))
    assert "cannot be reached (HfHubHTTPError: 503" in uploader.warning()
    folder = checkpoint(tmp_path, 8)
    uploader.send_checkpoint(folder)
    assert uploader.close()
    assert hub.files == content(folder)
    assert hub.private is True
    assert uploader.warning() is None


@pytest.mark.parametrize(("config", "is_main"), [(HubConfig(), True), (HubConfig(repo="org/name"), False)])
def test_without_a_repository_and_on_other_processes_nothing_is_uploaded(tmp_path, config, is_main):
    with make_uploader(config, tmp_path, is_main) as uploader:
        uploader.send_checkpoint(checkpoint(tmp_path, 8))
        assert (uploader.metrics(), uploader.warning(), uploader.fetch_checkpoint(tmp_path)) == ({}, None, None)
    assert not list(tmp_path.glob(".hub*"))


def test_the_wait_at_the_end_has_a_limit_and_names_the_next_command(hub, tmp_path, capsys):
    hang = Hang()

    def die(method: str) -> None:
        hang(method)
        if method == "create_commit":
            raise ConnectionResetError

    hub.failure = die
    config = HubConfig(wait_minutes=0)
    uploader = Uploader(config, tmp_path, Repository("org/name", True, hub), lambda _wake, _seconds: None)
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    uploader.send_export(export(tmp_path))
    assert hang.begun.wait(20)
    assert not uploader.close()
    hang.go_on.set()
    uploader._thread.join(5)
    printed = capsys.readouterr().out
    assert "waiting for checkpoints/000000008, export (0 minutes at most, Ctrl-C leaves at once)" in printed
    assert f"sollune publish {tmp_path} --to org/name sends what is missing there" in printed
    assert not uploader._thread.is_alive()


def test_an_upload_that_takes_hours_is_shown(hub, tmp_path):
    hub.failure = hang = Hang()
    hours = [0.0]
    uploader = Uploader(HubConfig(), tmp_path, Repository("org/name", True, hub), clock=lambda: 3600 * hours[0])
    uploader.send_checkpoint(checkpoint(tmp_path, 8))
    assert hang.begun.wait(20)
    assert uploader.warning() is None
    hours[0] = 2.0
    assert "sending for 120 minutes" in uploader.warning()
    hang.go_on.set()
    hours[0] = 0.0
    assert uploader.close()


def test_snapshots_of_a_dead_process_go_and_those_of_a_living_one_stay(tmp_path):
    living = Staging(tmp_path)
    snapshot = living.snapshot_checkpoint(checkpoint(tmp_path, 8))
    dead = tmp_path / living.folder.name.replace(str(os.getpid()), "999999999", 1)
    dead.mkdir()
    Staging(tmp_path)
    assert not dead.exists()
    assert snapshot.fault() is None


def test_the_name_of_a_small_file_is_the_one_that_git_gives(tmp_path):
    (tmp_path / "empty").touch()
    assert git_blob_id(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def published(hub: FolderHub, run: Path) -> None:
    config = publish.Config(run=run, to="org/name")
    publish.run(config, Repository("org/name", True, hub))


def test_publish_sends_the_newest_whole_checkpoint_and_the_export(hub, tmp_path, capsys):
    whole, damaged = checkpoint(tmp_path, 8), checkpoint(tmp_path, 16)
    (damaged / "optimizer.pt").unlink()
    export(tmp_path)
    published(hub, tmp_path)
    assert hub.files.items() >= content(whole).items()
    assert {path for path in hub.files if not path.startswith("checkpoints/")} >= {"README.md"}
    assert not any("000000016" in path for path in hub.files)
    assert "export is there, 3 files with the right hash" in capsys.readouterr().out
    assert not list(tmp_path.glob(".hub*"))


def test_publish_names_what_did_not_arrive(hub, tmp_path):
    checkpoint(tmp_path, 8)
    hub.failure = Times("create_commit", 1, refusal(500))
    with pytest.raises(Refused, match=r"checkpoints/000000008 has not arrived .* run the same command again"):
        published(hub, tmp_path)
    published(hub, tmp_path)
    assert "checkpoints/000000008/state.json" in hub.files


def test_publish_refuses_a_folder_that_holds_nothing_to_send(hub, tmp_path):
    with pytest.raises(Refused, match="holds neither an export nor a whole checkpoint"):
        published(hub, tmp_path)


def test_publish_requires_a_repository(tmp_path):
    with pytest.raises(Refused, match="to"):
        publish.main([str(tmp_path)])


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me"])
def test_a_repository_is_named_with_its_owner(name):
    with pytest.raises(ValueError, match="repo"):
        hub_module.HubConfig(repo=name)
