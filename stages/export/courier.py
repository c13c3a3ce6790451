"""Whether a run is kept beyond this machine, and what its training does about that."""

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from stages.export.hub import Courier, HubConfig
from stages.export.repository import Repository
from stages.train.hooks import Hooks

__all__ = ["AtHome", "Courier", "HubConfig", "courier_of", "sending"]


def courier_of(config: HubConfig, run: Path, is_main: bool = True) -> "Courier | AtHome":
    """The courier of a run folder, on the main process alone; one that stays at home where no repository is named.

    Raises `Refused` without a token, or where it may not write: before the first step, not after a day.
    """
    return Courier(config, run, Repository(config.repo, config.private)) if config.repo and is_main else AtHome()


def sending(hooks: Hooks, courier: "Courier | AtHome") -> Hooks:
    """The hooks of a story, and those of its courier: each checkpoint is sent, and one is fetched when none is here."""
    return replace(
        hooks,
        after_checkpoint=courier.send,
        extra=courier.told,
        warning=courier.warning,
        elsewhere=courier.fetch,
    )


class AtHome:
    """The courier of a run that is kept on this machine alone."""

    def __enter__(self) -> "AtHome":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def send(self, checkpoint: Path) -> None:
        """Nothing leaves."""

    def send_export(self, folder: Path) -> None:
        """Nothing leaves."""

    def told(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def warning(self) -> None:
        """Nothing to fear."""

    def fetch(self, folder: Path) -> None:
        """Nothing to fetch."""
