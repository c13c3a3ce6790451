"""Which process makes which shard: a claim is a file that one process creates and touches as a heartbeat.

Claims save work, and bytes never depend on them: two owners of one shard would write the same shard twice.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

from stages.system.disk import refuse_write_errors
from stages.system.ownership import is_alive, process_token
from stages.system.refusal import Refused, in_one_line

CLAIMS_FOLDER = ".claims"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


class Claims:
    """The claims of this process on parts of a cache; they end with the context, or with the process."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / CLAIMS_FOLDER
        self._clock_file = self.folder / f".now.{process_token()}"
        self._held_paths: set[Path] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "Claims":
        threading.Thread(target=self._run_heartbeat, name="claims", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for path in list(self._held_paths):
            self.release(path.name)
        for path in self.folder.glob("*"):  # stale claims on finished shards are taken over by no process
            token = path.name.rpartition(".")[2]
            if path.name.startswith("."):
                if is_alive(token) is False or token == process_token():
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
        with self._lock:
            self._held_paths.add(path)
        return True

    def release(self, name: str) -> None:
        """End a claim, unless another process took it for stale and has it now."""
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
