"""A model repository on the hub: the export at its root, checkpoints/<samples>/ below it.

A run's newest checkpoint, brought back from the hub to a machine that holds none.
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
from stages.system.refusal import Refused
from stages.train.checkpoint_store import fault_of, sha256

FILE_OF_CHECKPOINT = re.compile(rf"{CHECKPOINTS_FOLDER}/(\d+)/.+")
NO_RIGHTS_STATUS = {401, 402, 403, 404}
STALL_SECONDS = 300.0


class UploadMismatch(RuntimeError):
    """The hub lists another file than the one that was sent."""


class Repository:
    """One repository, made if it is missing."""

    def __init__(self, name: str, private: bool, api: HfApi | None = None) -> None:
        self.name, self.private, self._api = name, private, api or HfApi()
        self.is_open = False

    @property
    def api(self) -> HfApi:
        """The client, told to give up on a link that is silent for long: by itself it would wait for ever."""
        get_session().timeout = STALL_SECONDS
        return self._api

    def open(self) -> None:
        """Make it if it is missing; raises `Refused` where no attempt to come would be allowed to write.

        A hub that cannot be reached raises what the client raises.
        """
        if not (self.api.token or get_token()):
            raise Refused(f"hub {self.name}: no token found - run `hf auth login`, set HF_TOKEN, or name no repository")
        try:
            self.api.create_repo(self.name, private=self.private, exist_ok=True)
            self.api.auth_check(self.name, write=True)
            public = not self.api.repo_info(self.name).private
        except (HFValidationError, OfflineModeIsEnabled) as error:
            raise Refused(f"hub {self.name}: {first_line(error)} - mend that, or name no repository") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in NO_RIGHTS_STATUS:
                raise
            raise Refused(
                f"hub {self.name}: this token may not write there ({first_line(error)}) - "
                "take a token that may, name another repository, or none"
            ) from error
        if public and self.private:
            raise Refused(f"hub {self.name}: is public, private was asked for - name another, or say private false")
        self.is_open = True

    def upload(self, snapshot: Snapshot) -> None:
        """Send a parcel in one commit and find every file of it on the hub with the right hash.

        What is there already is not sent again. Raises `NotAsSent`, or what the client raises.
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
        found: dict[int, list[str]] = {}
        for path in self._tree():
            if match := FILE_OF_CHECKPOINT.fullmatch(path):
                found.setdefault(int(match[1]), []).append(path)
        return dict(sorted(found.items()))

    def remove_old_checkpoints(self, newest_samples: int, keep: int) -> None:
        """Delete the checkpoints up to `newest` beyond the last `keep`, and give back the room that they took.

        Later ones are left alone: they come from another life of the run, and nobody knows here what they are worth.
        """
        stale = {n: paths for n, paths in self.checkpoints().items() if n <= newest_samples}
        for n in list(stale)[-keep:]:
            del stale[n]
        if stale:
            folders = [checkpoint_folder(paths[0]) for paths in stale.values()]
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
            # Hashed here: what the client says of a file it may have from the very reading that went wrong.
            found, sent = (entry.lfs.sha256, sha256(file)) if entry.lfs else (entry.blob_id, git_blob_id(file))
            if found != sent:
                raise UploadMismatch(f"{path} has the hash {found[:12]}... there, sent was {sent[:12]}...")

    def _free_storage(self) -> None:
        """Give back the storage of checkpoints that are in the tree no more: a deletion alone leaves it in the history.

        Where somebody made a branch or a tag nothing is given back: it may hold one of them on purpose.
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
        # The history stays as it is, for whoever cloned it: only the content of these files goes.
        self.api.permanently_delete_lfs_files(self.name, dead, rewrite_history=False)


def checkpoint_folder(path: str) -> str:
    """The checkpoint in which a file of the repository lies."""
    return "/".join(path.split("/")[:2])


def git_blob_id(file: Path) -> str:
    """The name that git gives to a file's content (sha1); the hub lists it for files outside of LFS."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def root_cause(error: BaseException) -> str:
    """Why something failed, in one short line: the innermost cause's words, for the client wraps them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 160 letters."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no words"


MAX_TRIES, FIRST_PAUSE_SECONDS = 4, 10.0

T = TypeVar("T")


def fetch_newest_checkpoint(
    repository: Repository, folder: Path, sleep: Callable[[float], None] = time.sleep
) -> Path | None:
    """Bring the newest whole checkpoint of the repository into the folder of checkpoints; None when it holds none.

    Says which were passed over and why. Raises `Refused` when the hub cannot be asked: to begin anew instead would
    throw the run away.
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


def _with_retries(call: Callable[[], T], repository: Repository, sleep: Callable[[float], None]) -> T:
    """The answer, asked for a few times."""
    for attempt in range(MAX_TRIES):
        if attempt:
            sleep(FIRST_PAUSE_SECONDS * 2.0 ** (attempt - 1))
        try:
            return call()
        except Refused:
            raise
        except Exception as error:  # what the client and its transports raise has no common name
            last = error
    raise Refused(
        f"hub {repository.name}: cannot be asked for a checkpoint ({root_cause(last)}) - "
        "start again when it can be reached, or say hub.checkpoints false to begin anew"
    ) from last


def _move_into_place(downloaded: Path, folder: Path) -> Path:
    """Put a checkpoint in its place, where only one that was passed over as broken can stand."""
    final = folder / downloaded.name
    shutil.rmtree(final, ignore_errors=True)
    downloaded.replace(final)
    fsync_folder(folder)
    return final
