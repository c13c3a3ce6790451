"""The courier: brings checkpoints and exports to the hub behind the back of training."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import Field

from configs.refusal import Refused
from configs.strict import Strict
from stages.export.fetching import fetch_newest
from stages.export.outbox import Outbox
from stages.export.parcel import Parcel, Staging
from stages.export.repository import Repository, reason

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 15.0, 900.0
LONG_SECONDS = 3600.0
LOOK_SECONDS = 5.0


class HubConfig(Strict):
    """Where a run is kept beyond this machine; the token is the one of `hf auth login`, or HF_TOKEN."""

    repo: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="hub repository (ORG/NAME) that gets checkpoints and export; none keeps them here",
    )
    private: bool = Field(True, description="make the repository private, and refuse one that is public already")
    checkpoints: bool = Field(True, description="send checkpoints too, and go on from there when none is left here")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay in the repository")
    wait_minutes: float = Field(
        60.0, ge=0, description="longest wait at the end of a run for what has not arrived, min"
    )


def until_woken(wake: threading.Event, seconds: float) -> None:
    """Sleep, unless woken."""
    wake.wait(seconds)
    wake.clear()


class Courier:
    """One thread that sends what it is given; the caller's thread never waits for the hub, and never sees its errors.

    A checkpoint that waits is dropped for a newer one, an export never is; what fails is tried again until it arrives.
    """

    def __init__(
        self,
        config: HubConfig,
        run: Path,
        repository: Repository,
        pause: Callable[[threading.Event, float], None] = until_woken,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.run, self.repository = config, run, repository
        self._pause, self._clock, self._wake = pause, clock, threading.Event()
        self._outbox = Outbox()
        self._troubles: dict[str, str] = {}
        self._failures, self._arrived = 0, 0
        self._since: float | None = None
        self._greet()
        self._staging = Staging(run)
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Courier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, checkpoint: Path) -> None:
        """Take a checkpoint along; its folder may go right afterwards."""
        if self.config.checkpoints:
            self._take_along(checkpoint, self._staging.checkpoint)

    def send_export(self, folder: Path) -> None:
        """Take an export along; its folder may be replaced right afterwards."""
        self._take_along(folder, self._staging.export)

    def told(self) -> dict[str, Any]:
        """For a line of the journal: parcels not yet there, failures in a row, samples of the last checkpoint there."""
        waiting = len(self._outbox.left())
        return {"hub": {"waiting": waiting, "failures": self._failures, "samples": self._arrived}}

    def warning(self) -> str | None:
        """What is wrong, to be shown at every line of the log until it is mended; None when nothing is."""
        said, since = list(self._troubles.copy().values()), self._since
        if since is not None and (seconds := self._clock() - since) > LONG_SECONDS:
            said.append(f"sending for {seconds / 60:.0f} minutes, the link is slow or dead")
        return f"hub {self.repository.name}: {'; '.join(said)}" if said else None

    def fetch(self, folder: Path) -> Path | None:
        """Bring the newest whole checkpoint of the repository into the folder of checkpoints; None when it holds none.

        Raises `Refused` when the hub cannot be asked.
        """
        return fetch_newest(self.repository, folder) if self.config.checkpoints else None

    def close(self) -> bool:
        """Wait for what has not arrived, `wait_minutes` at most; whether all did, and how to send the rest by hand."""
        self._outbox.close()
        self._wake.set()
        try:
            self._wait()
        finally:  # an impatient Ctrl-C is told as well
            left = self._outbox.give_up()
            self._wake.set()
            self._staging.close()
            self._say_what_is_missing(left)
        return not left

    def _greet(self) -> None:
        """Ask at the door whether anything may be written; a hub that is only out of reach is asked again later."""
        try:
            self.repository.open()
        except Refused:
            raise
        except Exception as error:  # what the client and its transports raise has no common name
            self._troubles["start"] = f"cannot be reached ({reason(error)})"
            print(self.warning())

    def _take_along(self, source: Path, snapshot: Callable[[Path], Parcel]) -> None:
        try:
            self._outbox.add(snapshot(source))
        except OSError as error:
            self._troubles["snapshot"] = f"{source.name} could not be taken along ({reason(error)})"
        else:
            self._troubles.pop("snapshot", None)

    def _wait(self) -> None:
        left, shown = self._outbox.left(), self.warning()
        if left:
            limit = f"{self.config.wait_minutes:g} minutes at most, Ctrl-C leaves at once"
            print(f"hub {self.repository.name}: waiting for {', '.join(left)} ({limit})", flush=True)
        until = self._clock() + 60 * self.config.wait_minutes
        while self._thread.is_alive() and (rest := until - self._clock()) > 0:
            self._thread.join(min(rest, LOOK_SECONDS))
            if (now := self.warning()) and now != shown:
                print(now, flush=True)
            shown = now

    def _say_what_is_missing(self, left: list[str]) -> None:
        if warning := self.warning():
            print(warning)
        if left or self._troubles.keys() & {"checkpoint", "export", "snapshot"}:
            missing = f"{', '.join(left)} left behind, all of it lies in {self.run} - " if left else ""
            print(f"hub: {missing}sollune publish {self.run} --to {self.repository.name} sends what is missing there")

    # The thread's side

    def _work(self) -> None:
        while (parcel := self._outbox.take()) is not None:
            self._since = self._clock()
            try:
                self._deliver(parcel)
            except Exception as error:  # as in _greet; whatever it is, it is shown, and training goes on
                self._since = None
                self._pause(self._wake, self._failed(parcel, error))
            self._since = None

    def _deliver(self, parcel: Parcel) -> None:
        if fault := parcel.fault():
            self._troubles[parcel.kind] = f"{parcel.name} was damaged here before it was sent ({fault})"
            self._outbox.done()
            return
        self.repository.put(parcel)
        self._outbox.done()
        self._failures = 0
        for mended in ("start", parcel.kind):
            self._troubles.pop(mended, None)
        if parcel.samples is not None:
            self._arrived = parcel.samples
            self._make_room(parcel.samples)

    def _failed(self, parcel: Parcel, error: Exception) -> float:
        """Note a failure; returns the seconds until the next try."""
        self._failures += 1
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures - 1, 10))
        self._troubles[parcel.kind] = (
            f"{parcel.name} has not arrived ({reason(error)}), failure {self._failures}, next try in {pause:.0f} s"
        )
        self._outbox.put_back()
        return pause

    def _make_room(self, newest: int) -> None:
        """Remove superseded checkpoints; a failure costs room, not a checkpoint, and is mended after the next one."""
        try:
            self.repository.clear(newest, self.config.keep)
        except Exception as error:  # as in _greet
            self._troubles["room"] = f"superseded checkpoints could not be removed ({reason(error)})"
        else:
            self._troubles.pop("room", None)
