"""The parcels that wait for the hub, between the thread that trains and the one that sends.

The courier: brings checkpoints and exports to the hub behind the back of training.

Whether a run is kept beyond this machine, and what its training does about that.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import Field

from configs.values import Strict
from stages.hub.repository import Repository, fetch_newest_checkpoint, root_cause
from stages.hub.snapshot import Snapshot, Staging
from stages.system.refusal import Refused
from stages.train.loop import Hooks


class UploadQueue:
    """In order of arrival; a checkpoint that waits makes room for a newer one, so a slow link does not pile them up."""

    def __init__(self) -> None:
        self._pending: list[Snapshot] = []
        self._in_flight: Snapshot | None = None
        self._closing = False
        self._changed = threading.Condition()

    def add(self, snapshot: Snapshot) -> None:
        """Put a parcel in, and drop the checkpoint that it supersedes."""
        with self._changed:
            for older in [
                other for other in self._pending if other.samples is not None and snapshot.samples is not None
            ]:
                self._pending.remove(older)
                older.delete()
            self._pending.append(snapshot)
            self._changed.notify()

    def get(self) -> Snapshot | None:
        """Wait for a parcel; None when there is none and none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            self._in_flight = self._pending.pop(0) if self._pending else None
            return self._in_flight

    def finish(self) -> None:
        """Drop the parcel that was taken: it arrived, or never can."""
        with self._changed:
            if self._in_flight is not None:
                self._in_flight.delete()
            self._in_flight = None

    def requeue(self) -> None:
        """Put the parcel that was taken behind the others, which may fare better; dropped when superseded meanwhile."""
        with self._changed:
            parcel, self._in_flight = self._in_flight, None
            if parcel is None:
                return
            superseded = parcel.samples is not None and any(other.samples is not None for other in self._pending)
            if superseded:
                parcel.delete()
            else:
                self._pending.append(parcel)

    def close(self) -> None:
        """Let `take` come to an end when all is taken."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def abandon(self) -> list[str]:
        """Close, forget what waits, and say the names of all that did not arrive.

        The one on its way ends by itself once its snapshot is gone.
        """
        with self._changed:
            left = self.pending_names()
            self._pending, self._closing = [], True
            self._changed.notify()
            return left

    def pending_names(self) -> list[str]:
        """Names of what did not arrive yet, the one on its way first."""
        with self._changed:
            return [parcel.name for parcel in ([self._in_flight] if self._in_flight else []) + self._pending]


FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 15.0, 900.0
SLOW_UPLOAD_SECONDS = 3600.0
POLL_SECONDS = 5.0


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


def wait_for_wake(wake: threading.Event, seconds: float) -> None:
    """Sleep, unless woken."""
    wake.wait(seconds)
    wake.clear()


class Uploader:
    """One thread that sends what it is given; the caller's thread never waits for the hub, and never sees its errors.

    A checkpoint that waits is dropped for a newer one, an export never is; what fails is tried again until it arrives.
    """

    def __init__(
        self,
        config: HubConfig,
        run: Path,
        repository: Repository,
        pause: Callable[[threading.Event, float], None] = wait_for_wake,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.run, self.repository = config, run, repository
        self._pause, self._clock, self._wake = pause, clock, threading.Event()
        self._queue = UploadQueue()
        self._problems: dict[str, str] = {}
        self._failures, self._uploaded_samples = 0, 0
        self._upload_start: float | None = None
        self._check_access()
        self._staging = Staging(run)
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Take a checkpoint along; its folder may go right afterwards."""
        if self.config.checkpoints:
            self._enqueue(checkpoint, self._staging.snapshot_checkpoint)

    def send_export(self, folder: Path) -> None:
        """Take an export along; its folder may be replaced right afterwards."""
        self._enqueue(folder, self._staging.snapshot_export)

    def metrics(self) -> dict[str, Any]:
        """For a line of the journal: parcels not yet there, failures in a row, samples of the last checkpoint there."""
        waiting = len(self._queue.pending_names())
        return {"hub": {"waiting": waiting, "failures": self._failures, "samples": self._uploaded_samples}}

    def warning(self) -> str | None:
        """What is wrong, to be shown at every line of the log until it is mended; None when nothing is."""
        said, since = list(self._problems.copy().values()), self._upload_start
        if since is not None and (seconds := self._clock() - since) > SLOW_UPLOAD_SECONDS:
            said.append(f"sending for {seconds / 60:.0f} minutes, the link is slow or dead")
        return f"hub {self.repository.name}: {'; '.join(said)}" if said else None

    def fetch_checkpoint(self, folder: Path) -> Path | None:
        """Bring the newest whole checkpoint of the repository into the folder of checkpoints; None when it holds none.

        Raises `Refused` when the hub cannot be asked.
        """
        return fetch_newest_checkpoint(self.repository, folder) if self.config.checkpoints else None

    def close(self) -> bool:
        """Wait for what has not arrived, `wait_minutes` at most; whether all did, and how to send the rest by hand."""
        self._queue.close()
        self._wake.set()
        try:
            self._wait_for_uploads()
        finally:  # an impatient Ctrl-C is told as well
            left = self._queue.abandon()
            self._wake.set()
            self._staging.close()
            self._print_missing(left)
        return not left

    def _check_access(self) -> None:
        """Ask at the door whether anything may be written; a hub that is only out of reach is asked again later."""
        try:
            self.repository.open()
        except Refused:
            raise
        except Exception as error:  # what the client and its transports raise has no common name
            self._problems["start"] = f"cannot be reached ({root_cause(error)})"
            print(self.warning())

    def _enqueue(self, source: Path, take_snapshot: Callable[[Path], Snapshot]) -> None:
        try:
            self._queue.add(take_snapshot(source))
        except OSError as error:
            self._problems["snapshot"] = f"{source.name} could not be taken along ({root_cause(error)})"
        else:
            self._problems.pop("snapshot", None)

    def _wait_for_uploads(self) -> None:
        left, shown = self._queue.pending_names(), self.warning()
        if left:
            limit = f"{self.config.wait_minutes:g} minutes at most, Ctrl-C leaves at once"
            print(f"hub {self.repository.name}: waiting for {', '.join(left)} ({limit})", flush=True)
        until = self._clock() + 60 * self.config.wait_minutes
        while self._thread.is_alive() and (rest := until - self._clock()) > 0:
            self._thread.join(min(rest, POLL_SECONDS))
            if (now := self.warning()) and now != shown:
                print(now, flush=True)
            shown = now

    def _print_missing(self, missing_names: list[str]) -> None:
        if warning := self.warning():
            print(warning)
        if missing_names or self._problems.keys() & {"checkpoint", "export", "snapshot"}:
            missing = (
                f"{', '.join(missing_names)} left behind, all of it lies in {self.run} - " if missing_names else ""
            )
            print(f"hub: {missing}sollune publish {self.run} --to {self.repository.name} sends what is missing there")

    # The thread's side

    def _run(self) -> None:
        while (parcel := self._queue.get()) is not None:
            self._upload_start = self._clock()
            try:
                self._upload(parcel)
            except Exception as error:  # as in _greet; whatever it is, it is shown, and training goes on
                self._upload_start = None
                self._pause(self._wake, self._record_failure(parcel, error))
            self._upload_start = None

    def _upload(self, snapshot: Snapshot) -> None:
        if fault := snapshot.fault():
            self._problems[snapshot.kind] = f"{snapshot.name} was damaged here before it was sent ({fault})"
            self._queue.finish()
            return
        self.repository.upload(snapshot)
        self._queue.finish()
        self._failures = 0
        for mended in ("start", snapshot.kind):
            self._problems.pop(mended, None)
        if snapshot.samples is not None:
            self._uploaded_samples = snapshot.samples
            self._remove_old_checkpoints(snapshot.samples)

    def _record_failure(self, snapshot: Snapshot, error: Exception) -> float:
        """Note a failure; returns the seconds until the next try."""
        self._failures += 1
        pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures - 1, 10))
        self._problems[snapshot.kind] = (
            f"{snapshot.name} has not arrived ({root_cause(error)}), failure {self._failures}, next try in "
            f"{pause:.0f} s"
        )
        self._queue.requeue()
        return pause

    def _remove_old_checkpoints(self, newest_samples: int) -> None:
        """Remove superseded checkpoints; a failure costs room, not a checkpoint, and is mended after the next one."""
        try:
            self.repository.remove_old_checkpoints(newest_samples, self.config.keep)
        except Exception as error:  # as in _greet
            self._problems["room"] = f"superseded checkpoints could not be removed ({root_cause(error)})"
        else:
            self._problems.pop("room", None)


__all__ = ["HubConfig", "NoUploader", "Uploader", "make_uploader", "with_upload_hooks"]


def make_uploader(config: HubConfig, run: Path, is_main: bool = True) -> "Uploader | NoUploader":
    """The courier of a run folder, on the main process alone; one that stays at home where no repository is named.

    Raises `Refused` without a token, or where it may not write: before the first step, not after a day.
    """
    return Uploader(config, run, Repository(config.repo, config.private)) if config.repo and is_main else NoUploader()


def with_upload_hooks(hooks: Hooks, uploader: "Uploader | NoUploader") -> Hooks:
    """The hooks of a story, and those of its courier: each checkpoint is sent, and one is fetched when none is here."""
    return replace(
        hooks,
        on_checkpoint_saved=uploader.send_checkpoint,
        extra_metrics=uploader.metrics,
        warning=uploader.warning,
        fetch_checkpoint=uploader.fetch_checkpoint,
    )


class NoUploader:
    """The courier of a run that is kept on this machine alone."""

    def __enter__(self) -> "NoUploader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Nothing leaves."""

    def send_export(self, folder: Path) -> None:
        """Nothing leaves."""

    def metrics(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def warning(self) -> None:
        """Nothing to fear."""

    def fetch_checkpoint(self, folder: Path) -> None:
        """Nothing to fetch."""
