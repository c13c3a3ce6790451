"""Which process makes which shard: a claim is a file that one process creates and touches as a heartbeat.

Claims save work, and bytes never depend on them: two owners of one shard would write the same shard twice.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.journal import JOURNAL_FOLDER
from stages.system.disk import refuse_write_errors
from stages.system.ownership import is_alive, process_token
from stages.system.refusal import Refused, in_one_line
from stages.system.storage.locations import Location, location_of
from stages.system.storage.mirror import bring_folder, send_folder
from stages.system.storage.remote_claim import RemoteClaim

CLAIMS_FOLDER = ".claims"
MARK_PREFIX = ".workers."
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
REMOTE_POLL_SECONDS = 5.0
"""Between two looks at a claim of another machine."""


@contextmanager
def marked(cache: Path) -> Iterator[Path]:
    """A hidden file of this process beside the claims: who sees it under this path has the same folder."""
    mark = cache / CLAIMS_FOLDER / f"{MARK_PREFIX}{process_token()}"
    with refuse_write_errors(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)
        with suppress(OSError):  # it holds claims
            mark.parent.rmdir()


class Claims:
    """The claims of this process on parts of a cache; they end with the context, or with the process."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / CLAIMS_FOLDER
        self._clock_file = self.folder / f".now.{process_token()}"
        self._location = location_of(cache)
        self._remote: dict[str, RemoteClaim] = {}
        self._busy_until: dict[str, float] = {}
        self._held_paths: set[Path] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "Claims":
        threading.Thread(target=self._run_heartbeat, name="claims", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for path in list(self._held_paths):
            with suppress(Refused):  # a store that is out of reach: the claim ends by itself
                self.release(path.name, is_done=False)
        for path in self.folder.glob("*"):  # stale claims on finished shards are taken over by no process
            token = path.name.rpartition(".")[2]
            if path.name.startswith("."):
                own = token == process_token() and not path.name.startswith(MARK_PREFIX)
                if own or is_alive(token) is False:
                    path.unlink(missing_ok=True)
            elif self.is_stale(path.name):
                self._remove_stale(path.name)
        self._clock_file.unlink(missing_ok=True)  # `is_stale` made it
        with suppress(OSError):  # it holds claims of other processes, or was never made
            self.folder.rmdir()

    def acquire(self, name: str) -> bool:
        """Claim `name`; False while a living process has it. The claim of a dead process is taken over."""
        path = self.folder / name
        if not self._create(path):
            if not self.is_stale(name):
                return False
            self._remove_stale(name)
            if not self._create(path):
                return False
        if self._location is not None and not self._acquire_remote(name, self._location):
            path.unlink(missing_ok=True)
            return False
        with self._lock:
            self._held_paths.add(path)
        return True

    def _acquire_remote(self, name: str, location: Location) -> bool:
        """Claim it among all machines; what the last owner made is known here then."""
        if time.monotonic() < self._busy_until.get(name, 0.0):
            return False
        claim = RemoteClaim(location / CLAIMS_FOLDER / name)
        if claim.acquire() is not None:
            self._busy_until[name] = time.monotonic() + REMOTE_POLL_SECONDS
            return False
        self._remote[name] = claim
        bring_folder(self.folder.parent / JOURNAL_FOLDER, again=False)  # damaged shards are forgotten
        return True

    def release(self, name: str, *, is_done: bool = True) -> None:
        """End a claim, unless another process took it for stale and has it now.

        Where other machines wait for what was made, it is sent first.
        """
        if (claim := self._remote.pop(name, None)) is not None:
            if is_done:
                send_folder(self.folder.parent)
            claim.release()
        path = self.folder / name
        with self._lock:
            self._held_paths.discard(path)
        if self.owner_of(name) == process_token():
            path.unlink(missing_ok=True)

    def owner_of(self, name: str) -> str | None:
        """The token of the process that claims `name`, None when there is none."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{self.folder / name}: no claim ({in_one_line(error)}) - remove {self.folder}") from error

    def is_stale(self, name: str) -> bool:
        """Whether a claim's owner has ended: a dead process of this machine, or any without a recent heartbeat."""
        token = self.owner_of(name)
        # A process that was killed between creating the file and writing its token never writes it.
        max_age = BEAT_SECONDS if token == "" else STALE_SECONDS
        try:
            # The folder's own clock on both sides: the clocks of two machines differ.
            return is_alive(token or "") is False or self._now() - (self.folder / name).stat().st_mtime > max_age
        except FileNotFoundError:
            return True

    def _remove_stale(self, name: str) -> None:
        aside = self.folder / f".dead.{name}.{process_token()}"
        with suppress(FileNotFoundError):  # it was released, or removed by another process
            (self.folder / name).rename(aside)
            aside.unlink()

    def _create(self, path: Path) -> bool:
        with refuse_write_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(process_token())
        return True

    def _now(self) -> float:
        self._clock_file.touch()
        return self._clock_file.stat().st_mtime

    def _run_heartbeat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                held = list(self._held_paths)
            for path in held:
                with suppress(OSError):  # it is gone, or the disk fails, which writing a shard reports
                    os.utime(path)
