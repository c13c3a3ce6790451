"""Claims between machines: an object that a store creates only where none is, stored again as a heartbeat.

A claim whose process has ended, or gave no sign for long by the store's clock, is taken over. Who lost it sends nothing
more, see `lease`.
"""

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.system.ownership import CLAIM_FILE, claim_folder, is_alive, process_token
from stages.system.refusal import Refused
from stages.system.storage.lease import field_of, forget_claim, host_of, note_claim, note_loss, renew
from stages.system.storage.locations import Location, location_of
from stages.system.storage.mirror import bring_folder, send_folder
from stages.system.storage.object_store import StoredObject, store_of

BEAT_SECONDS = 20.0
STALE_SECONDS = 120.0


class RemoteClaim:
    """The claim of this process on a location: an object of this name, from `acquire` to `release`."""

    def __init__(self, location: Location) -> None:
        self.location, self._store, self._path = location, store_of(location), location.folder
        self._number = uuid.uuid4().hex
        claim = {"owner": process_token(), "host": socket.gethostname(), "claim": self._number}
        self._content = json.dumps(claim).encode()
        self.loss: str | None = None
        """The line that says that another machine took it over."""
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> str | None:
        """Claim it; returns the host of another process that has it, or None where it is ours now."""
        for _ in range(2):  # a claim that is released meanwhile is tried once more
            now = time.monotonic()
            if self._store.create(self.location, self._content):
                self._hold(now)
                return None
            stored, content = self._store.info(self.location), self._store.read(self.location)
            if stored is None or content is None:
                continue
            if not self._is_stale(stored, content):
                return host_of(content)
            if self._store.replace(self.location, self._content, stored):
                self._hold(now)
                return None
        return "another machine"

    def renew(self) -> bool:
        """Store it again, whose age then begins anew; False where another machine has taken it over."""
        if self.loss is None:
            now = time.monotonic()
            if (host := renew(self._store, self.location, self._number)) is None:
                note_claim(self._path, self._number, now)
            else:
                self.loss = note_loss(self._path, self._number, host)
        return self.loss is None

    def release(self) -> None:
        """End the claim, unless another process took it over."""
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        if self.renew():  # so that nobody takes it over before it is deleted
            forget_claim(self._path)  # first: an object that is gone is lost otherwise
            self._store.delete(self.location)

    def _hold(self, since: float) -> None:
        note_claim(self._path, self._number, since)
        self._beating = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(Exception):  # a store out of reach, a full disk: what is sent next reports it
                if not self.renew():
                    return

    def _is_stale(self, stored: StoredObject, content: bytes) -> bool:
        """Whether the owner has ended: a dead process of this machine, or any without a recent heartbeat."""
        if is_alive(field_of(content, "owner")) is False:
            return True
        clock = Location(self.location.scheme, f"{self.location.key}.now.{process_token()}")
        try:  # the store's own clock on both sides: those of two machines differ
            now = self._store.put_whole(clock, b"now").modified
        finally:
            self._store.delete(clock)
        return now - stored.modified > STALE_SECONDS


@contextmanager
def claim_place(folder: Path, purpose: str) -> Iterator[None]:
    """Claim a folder on this machine, as `claim_folder` does, and its location, where it has one, among all machines.

    What other machines did there before is brought first, and what was done is sent before the claim ends.
    Raises `Refused` where another machine works there, and at the end where one took it over.
    """
    location = location_of(folder)
    with claim_folder(folder, purpose):
        if location is None:
            yield
            return
        claim = RemoteClaim(location / CLAIM_FILE)
        if host := claim.acquire():
            raise Refused(
                f"{location}: a process on {host} works here, and one at a time may {purpose} it - wait until it is "
                f"done, or {STALE_SECONDS:.0f} s after it was killed, or choose another folder"
            )
        try:
            bring_folder(folder)
            yield
            with suppress(Refused):  # out of reach
                claim.renew()
            if claim.loss is not None:
                raise Refused(claim.loss)
        finally:
            with suppress(Refused):  # the end of the command tries again, and reports it
                send_folder(folder)
            with suppress(Refused):  # it ends by itself
                claim.release()
