"""A run's newest checkpoint, brought back from the hub to a machine that holds none."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from configs.atomic import fsync_folder
from configs.refusal import Refused
from stages.export.repository import Repository, reason
from stages.train.statement import fault_of

TRIES, FIRST_PAUSE_SECONDS = 4, 10.0

T = TypeVar("T")


def fetch_newest(repository: Repository, folder: Path, sleep: Callable[[float], None] = time.sleep) -> Path | None:
    """Bring the newest whole checkpoint of the repository into the folder of checkpoints; None when it holds none.

    Says which were passed over and why. Raises `Refused` when the hub cannot be asked: to begin anew instead would
    throw the run away.
    """
    unfinished = folder / ".hub.partial"
    try:
        for paths in reversed(_patiently(repository.checkpoints, repository, sleep).values()):
            arrived = _patiently(partial(repository.bring, paths, unfinished), repository, sleep)
            if fault := fault_of(arrived):
                print(f"hub {repository.name}: checkpoints/{arrived.name} passed over, {fault}")
                continue
            print(f"hub {repository.name}: checkpoints/{arrived.name} fetched, it is whole")
            return _moved(arrived, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"hub {repository.name}: no whole checkpoint there")
    return None


def _patiently(ask: Callable[[], T], repository: Repository, sleep: Callable[[float], None]) -> T:
    """The answer, asked for a few times."""
    for attempt in range(TRIES):
        if attempt:
            sleep(FIRST_PAUSE_SECONDS * 2.0 ** (attempt - 1))
        try:
            return ask()
        except Refused:
            raise
        except Exception as error:  # what the client and its transports raise has no common name
            last = error
    raise Refused(
        f"hub {repository.name}: cannot be asked for a checkpoint ({reason(last)}) - "
        "start again when it can be reached, or say hub.checkpoints false to begin anew"
    ) from last


def _moved(arrived: Path, folder: Path) -> Path:
    """Put a checkpoint in its place, where only one that was passed over as broken can stand."""
    final = folder / arrived.name
    shutil.rmtree(final, ignore_errors=True)
    arrived.replace(final)
    fsync_folder(folder)
    return final
