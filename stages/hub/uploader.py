"""Upload of a run's checkpoints and export to the hub in the background, while training goes on."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from configs.values import Strict
from stages.hub.repository import Repository, backoff_seconds, fetch_newest_checkpoint, root_cause
from stages.hub.snapshot import Snapshot, Staging, UploadQueue
from stages.system.refusal import Refused
from stages.train.loop import Hooks

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 15.0, 900.0
SLOW_UPLOAD_SECONDS = 3600.0
POLL_SECONDS = 5.0


class HubConfig(Strict):
    """The hub repository of a run; the token is the one of `hf auth login`, or HF_TOKEN."""

    repo: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="hub repository (ORG/NAME) that gets checkpoints and export; none keeps them here",
    )
    private: bool = Field(True, description="make the repository private, and refuse one that is public already")
    checkpoints: bool = Field(True, description="upload checkpoints too, and resume from there when none is left here")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay in the repository")
    wait_minutes: float = Field(60.0, ge=0, description="longest wait at the end of a run for pending uploads, min")


def make_uploader(config: HubConfig, run: Path, is_main: bool = True) -> "Uploader":
    """The uploader of a run folder, on the main process alone; one that does nothing where no repository is named.

    Raises `Refused` without a token, or where it may not write: before the first step, not after a day.
    """
    return Uploader(config, run, Repository(config.repo or "", config.private), enabled=bool(config.repo and is_main))


def with_upload_hooks(hooks: Hooks, uploader: "Uploader") -> Hooks:
    """The hooks of a run with an uploader's: each checkpoint is uploaded, and one is fetched when none is here."""
    return replace(
        hooks,
        on_checkpoint_saved=uploader.send_checkpoint,
        extra_metrics=uploader.metrics,
        warning=uploader.warning,
        fetch_checkpoint=uploader.fetch_checkpoint,
    )


def wait_for_wake(wake: threading.Event, seconds: float) -> None:
    """Sleep, unless woken."""
    wake.wait(seconds)
    wake.clear()


class Uploader:
    """A thread that uploads, if `enabled`; the caller's thread never waits for the hub, and never gets its errors.

    A waiting checkpoint is dropped for a newer one, an export never is; a failed upload is retried until it arrives.
    """

    def __init__(
        self,
        config: HubConfig,
        run: Path,
        repository: Repository,
        pause: Callable[[threading.Event, float], None] = wait_for_wake,
        clock: Callable[[], float] = time.monotonic,
        *,
        enabled: bool = True,
    ) -> None:
        self.config, self.run, self.repository, self.enabled = config, run, repository, enabled
        self._pause, self._clock, self._wake = pause, clock, threading.Event()
        self._queue = UploadQueue()
        self._problems: dict[str, str] = {}
        self._failures, self._uploaded_samples = 0, 0
        self._upload_start: float | None = None
        self._staging = Staging(run)
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        if enabled:
            self._check_access()
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_checkpoint(self, checkpoint: Path) -> None:
        """Upload a checkpoint; its folder may be removed right afterwards."""
        if self.config.checkpoints:
            self._enqueue(checkpoint, self._staging.snapshot_checkpoint)

    def send_export(self, folder: Path) -> None:
        """Upload an export; its folder may be replaced right afterwards."""
        self._enqueue(folder, self._staging.snapshot_export)

    def metrics(self) -> dict[str, Any]:
        """For a line of the journal: pending uploads, failures in a row, samples of the last checkpoint uploaded."""
        if not self.enabled:
            return {}
        waiting = len(self._queue.pending_names())
        return {"hub": {"waiting": waiting, "failures": self._failures, "samples": self._uploaded_samples}}

    def warning(self) -> str | None:
        """Every present problem, for each line of the log; None when there is none."""
        problems, since = list(self._problems.copy().values()), self._upload_start
        if since is not None and (seconds := self._clock() - since) > SLOW_UPLOAD_SECONDS:
            problems.append(f"sending for {seconds / 60:.0f} minutes, the link is slow or dead")
        return f"hub {self.repository.name}: {'; '.join(problems)}" if problems else None

    def fetch_checkpoint(self, folder: Path) -> Path | None:
        """Download the newest whole checkpoint of the repository into the folder of checkpoints; None without one.

        Raises `Refused` when the hub cannot be reached.
        """
        wanted = self.enabled and self.config.checkpoints
        return fetch_newest_checkpoint(self.repository, folder) if wanted else None

    def close(self) -> bool:
        """Wait for pending uploads, `wait_minutes` at most; whether all arrived, else print how to send the rest."""
        self._queue.close()
        self._wake.set()
        try:
            self._wait_for_uploads()
        finally:  # after a Ctrl-C as well
            left = self._queue.abandon()
            self._wake.set()
            self._staging.close()
            self._print_missing(left)
        return not left

    def _check_access(self) -> None:
        """Refuse at once what cannot be written to; a hub that is only out of reach is tried again later."""
        try:
            self.repository.open()
        except Refused:
            raise
        except Exception as error:  # the client and its transports raise many kinds
            self._problems["start"] = f"cannot be reached ({root_cause(error)})"
            print(self.warning())

    def _enqueue(self, source: Path, take_snapshot: Callable[[Path], Snapshot]) -> None:
        if not self.enabled:
            return
        try:
            self._queue.add(take_snapshot(source))
        except OSError as error:
            self._problems["snapshot"] = f"no snapshot of {source.name} could be made ({root_cause(error)})"
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

    def _print_missing(self, names: list[str]) -> None:
        if warning := self.warning():
            print(warning)
        if names or self._problems.keys() & {"checkpoint", "export", "snapshot"}:
            missing = f"{', '.join(names)} not sent, all of it lies in {self.run} - " if names else ""
            print(f"hub: {missing}sollune publish {self.run} --to {self.repository.name} sends what is missing there")

    # In the thread

    def _run(self) -> None:
        while (snapshot := self._queue.get()) is not None:
            self._upload_start = self._clock()
            try:
                self._upload(snapshot)
            except Exception as error:  # whatever it is, it is shown, and training goes on
                self._upload_start = None
                self._pause(self._wake, self._record_failure(snapshot, error))
            self._upload_start = None

    def _upload(self, snapshot: Snapshot) -> None:
        if fault := snapshot.fault():
            self._problems[snapshot.kind] = f"{snapshot.name} was damaged here before it was sent ({fault})"
            self._queue.finish()
            return
        self.repository.upload(snapshot)
        self._queue.finish()
        self._failures = 0
        for solved in ("start", snapshot.kind):
            self._problems.pop(solved, None)
        if snapshot.samples is not None:
            self._uploaded_samples = snapshot.samples
            self._remove_old_checkpoints(snapshot.samples)

    def _record_failure(self, snapshot: Snapshot, error: Exception) -> float:
        """Note a failure; returns the seconds until the next try."""
        self._failures += 1
        pause = min(MAX_PAUSE_SECONDS, backoff_seconds(FIRST_PAUSE_SECONDS, self._failures))
        reason = f"({root_cause(error)}), failure {self._failures}, next try in {pause:.0f} s"
        self._problems[snapshot.kind] = f"{snapshot.name} has not arrived {reason}"
        self._queue.requeue()
        return pause

    def _remove_old_checkpoints(self, newest_samples: int) -> None:
        """Remove superseded checkpoints; a failure costs storage only, and is repaired after the next upload."""
        try:
            self.repository.remove_old_checkpoints(newest_samples, self.config.keep)
        except Exception as error:  # as in _check_access
            self._problems["room"] = f"superseded checkpoints could not be removed ({root_cause(error)})"
        else:
            self._problems.pop("room", None)
