"""Who makes which shard: a claim is a file that one process alone can create, and that it keeps warm.

Claims save work, and bytes never depend on them: two owners of one shard would write the same shard twice.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from configs.disk import writing
from configs.owner import lives, owner
from configs.refusal import Refused, in_one_line

NAME = ".claims"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


class Claims:
    """The claims of this process on parts of a cache; they end with the context, or with the process."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / NAME
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "Claims":
        threading.Thread(target=self._beat, name="claims", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for path in list(self._held):
            self.release(path.name)
        for path in self.folder.glob("*"):  # of what is finished already nobody takes over the claim
            word = path.name.rpartition(".")[2]
            if path.name.startswith("."):
                if lives(word) is False or word == owner():
                    path.unlink(missing_ok=True)
            elif self.is_dead(path.name):
                self._bury(path.name)
        self._probe.unlink(missing_ok=True)  # to ask after the dead is to probe
        with suppress(OSError):  # somebody else's claims are still in it, or it was never made
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim `name`; False while a living process has it. The claim of a dead one is taken over."""
        path = self.folder / name
        if not self._create(path):
            if not self.is_dead(name):
                return False
            self._bury(name)
            if not self._create(path):
                return False
        with self._lock:
            self._held.add(path)
        return True

    def release(self, name: str) -> None:
        """Give a claim back, unless somebody took it for dead and has it now."""
        path = self.folder / name
        with self._lock:
            self._held.discard(path)
        if self.owner_of(name) == owner():
            path.unlink(missing_ok=True)

    def owner_of(self, name: str) -> str | None:
        """The process that claims `name`, None when nobody does."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{self.folder / name}: no claim ({in_one_line(error)}) - remove {self.folder}") from error

    def is_dead(self, name: str) -> bool:
        """Whether a claim's owner is gone: seen from here, or because it has not been kept warm."""
        word = self.owner_of(name)
        # Whoever was killed between making the claim and signing it never signs it.
        stale = BEAT_SECONDS if word == "" else STALE_SECONDS
        try:
            # The folder's own clock on both sides: the clocks of two machines differ.
            return lives(word or "") is False or self._now() - (self.folder / name).stat().st_mtime > stale
        except FileNotFoundError:
            return True

    def _bury(self, name: str) -> None:
        aside = self.folder / f".dead.{name}.{owner()}"
        with suppress(FileNotFoundError):  # it was released, or another process buries it
            (self.folder / name).rename(aside)
            aside.unlink()

    def _create(self, path: Path) -> bool:
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(owner())
        return True

    @property
    def _probe(self) -> Path:
        return self.folder / f".now.{owner()}"

    def _now(self) -> float:
        self._probe.touch()
        return self._probe.stat().st_mtime

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                held = list(self._held)
            for path in held:
                with suppress(OSError):  # it is gone, or the disk fails, which whoever writes a shard will tell
                    os.utime(path)
