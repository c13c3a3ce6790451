"""A model repository on the hub: the export at its root, checkpoints/<samples>/ below it.

`fetch_newest_checkpoint` downloads the newest checkpoint of a run to a machine that holds none.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from stages.hub.snapshot import CHECKPOINTS_FOLDER, Snapshot
from stages.system.atomic import fsync_folder
from stages.system.disk import file_sha256
from stages.system.refusal import Refused
from stages.train.checkpoint_store import fault_of

FILE_OF_CHECKPOINT = re.compile(rf"{CHECKPOINTS_FOLDER}/(\d+)/.+")
NO_RIGHTS_STATUS = {401, 402, 403, 404}
STALL_SECONDS = 300.0
MAX_TRIES, FIRST_PAUSE_SECONDS = 4, 10.0
T = TypeVar("T")


class UploadMismatch(RuntimeError):
    """The hub lists another file than the one that was sent."""


class Repository:
    """One repository, made if it is missing."""

    def __init__(self, name: str, private: bool, api: HfApi | None = None) -> None:
        self.name, self.private, self._api = name, private, api or HfApi()
        self.is_open = False

    @property
    def api(self) -> HfApi:
        """The client, with a timeout for a silent link: its own default is to wait for ever."""
        get_session().timeout = STALL_SECONDS
        return self._api

    def open(self) -> None:
        """Make it if it is missing; raises `Refused` where later uploads would not be permitted.

        A hub that cannot be reached raises what the client raises.
        """
        if not (self.api.token or get_token()):
            raise Refused(f"hub {self.name}: no token found - run `hf auth login`, set HF_TOKEN, or name no repository")
        try:
            self.api.create_repo(self.name, private=self.private, exist_ok=True)
            self.api.auth_check(self.name, write=True)
            public = not self.api.repo_info(self.name).private
        except (HFValidationError, OfflineModeIsEnabled) as error:
            raise Refused(f"hub {self.name}: {first_line(error)} - correct that, or name no repository") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in NO_RIGHTS_STATUS:
                raise
            raise Refused(
                f"hub {self.name}: this token may not write there ({first_line(error)}) - "
                "take a token that may, name another repository, or none"
            ) from error
        if public and self.private:
            raise Refused(f"hub {self.name}: is public, the setting is private - name another, or set private false")
        self.is_open = True

    def upload(self, snapshot: Snapshot) -> None:
        """Send a snapshot in one commit and compare the hash of every file on the hub.

        Files that are there already are not sent again. Raises `UploadMismatch`, or what the client raises.
        """
        if not self.is_open:
            self.open()
        files = snapshot.files()
        additions = [CommitOperationAdd(path, file) for path, file in files.items()]
        for addition in additions:
            # One at a time: of several the client makes threads, and a stuck one would keep the program from ending.
            self.api.preupload_lfs_files(self.name, [addition], free_memory=False)
        commit = self.api.create_commit(self.name, additions, commit_message=f"Add {snapshot.name}")
        self._verify(files, commit.oid)

    def checkpoints(self) -> dict[int, list[str]]:
        """Samples seen -> paths of a checkpoint's files, in rising order."""
        if not self.is_open:
            self.open()
        files: dict[int, list[str]] = {}
        for path in self._tree():
            if match := FILE_OF_CHECKPOINT.fullmatch(path):
                files.setdefault(int(match[1]), []).append(path)
        return dict(sorted(files.items()))

    def remove_old_checkpoints(self, newest_samples: int, keep: int) -> None:
        """Delete the checkpoints up to `newest_samples` but for the last `keep`, and free their storage.

        Later ones are left alone: they come from another attempt of the run, and may be worth keeping.
        """
        stale = [paths for n, paths in self.checkpoints().items() if n <= newest_samples][:-keep]
        if stale:
            folders = [checkpoint_folder(paths[0]) for paths in stale]
            deletions = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in folders]
            self.api.create_commit(self.name, deletions, commit_message=f"Remove {', '.join(folders)}")
            self._free_storage()

    def download(self, paths: Sequence[str], target: Path) -> Path:
        """Download the files of one checkpoint below `target`; returns the checkpoint's folder there."""
        shutil.rmtree(target, ignore_errors=True)
        for path in paths:
            self.api.hf_hub_download(self.name, path, local_dir=target)
        return target / checkpoint_folder(paths[0])

    def _tree(self) -> dict[str, RepoFile]:
        return {
            file.path: file for file in self.api.list_repo_tree(self.name, recursive=True) if isinstance(file, RepoFile)
        }

    def _verify(self, files: Mapping[str, Path], revision: str) -> None:
        listed = {file.path: file for file in self.api.get_paths_info(self.name, list(files), revision=revision)}
        for path, file in files.items():
            entry = listed.get(path)
            if not isinstance(entry, RepoFile):
                raise UploadMismatch(f"{path} is not in the repository after it was sent")
            # Hashed here: the client's own hash may come from the very reading that went wrong.
            remote, sent = (entry.lfs.sha256, file_sha256(file)) if entry.lfs else (entry.blob_id, git_blob_id(file))
            if remote != sent:
                raise UploadMismatch(f"{path} has the hash {remote[:12]}... there, sent was {sent[:12]}...")

    def _free_storage(self) -> None:
        """Free the storage of checkpoints that are no longer in the tree: a deletion alone leaves it in the history.

        Nothing is freed where there is another branch or a tag: it may hold one of them on purpose.
        """
        refs = self.api.list_repo_refs(self.name)
        if len(refs.branches) > 1 or refs.tags:
            return
        alive = {file.lfs.sha256 for file in self._tree().values() if file.lfs}
        dead = [
            file
            for file in self.api.list_lfs_files(self.name)
            if FILE_OF_CHECKPOINT.fullmatch(file.filename) and file.file_oid not in alive
        ]
        # The history stays as it is, for its clones: only the content of these files is deleted.
        self.api.permanently_delete_lfs_files(self.name, dead, rewrite_history=False)


def checkpoint_folder(path: str) -> str:
    """The folder of a file of a checkpoint in the repository."""
    return "/".join(path.split("/")[:2])


def git_blob_id(file: Path) -> str:
    """git's hash of a file's content (sha1), which the hub lists for files outside of LFS."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def root_cause(error: BaseException) -> str:
    """Why something failed, in one short line: the innermost cause, which the client wraps."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 160 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def fetch_newest_checkpoint(
    repository: Repository, folder: Path, sleep: Callable[[float], None] = time.sleep
) -> Path | None:
    """Download the newest whole checkpoint of the repository into the folder of checkpoints; None when it holds none.

    Prints which were passed over and why. Raises `Refused` when the hub cannot be reached: starting again instead would
    lose the run.
    """
    unfinished = folder / ".hub.partial"
    try:
        for paths in reversed(_with_retries(repository.checkpoints, repository, sleep).values()):
            arrived = _with_retries(partial(repository.download, paths, unfinished), repository, sleep)
            if fault := fault_of(arrived):
                print(f"hub {repository.name}: checkpoints/{arrived.name} passed over, {fault}")
                continue
            print(f"hub {repository.name}: checkpoints/{arrived.name} fetched, it is whole")
            return _move_into_place(arrived, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"hub {repository.name}: no whole checkpoint there")
    return None


def backoff_seconds(first_pause: float, failures: int) -> float:
    """The pause after so many failures in a row, which doubles up to the eleventh."""
    return first_pause * 2.0 ** min(failures - 1, 10)


def _with_retries(call: Callable[[], T], repository: Repository, sleep: Callable[[float], None]) -> T:
    for failures in range(MAX_TRIES):
        if failures:
            sleep(backoff_seconds(FIRST_PAUSE_SECONDS, failures))
        try:
            return call()
        except Refused:
            raise
        except Exception as error:  # the client and its transports raise many kinds
            last = error
    raise Refused(
        f"hub {repository.name}: no checkpoint can be fetched ({root_cause(last)}) - "
        "start again when it can be reached, or set hub.checkpoints false to begin anew"
    ) from last


def _move_into_place(downloaded: Path, folder: Path) -> Path:
    """Only a broken checkpoint can have that name: it is replaced."""
    final = folder / downloaded.name
    shutil.rmtree(final, ignore_errors=True)
    downloaded.replace(final)
    fsync_folder(folder)
    return final
