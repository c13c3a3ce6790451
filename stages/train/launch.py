"""Several processes for one story, on this machine: torch's elastic launcher starts them and passes signals on."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from configs.hangup import is_ignored
from configs.load import resolved_yaml
from configs.refusal import Refused
from configs.strict import Strict
from stages.train.interrupt import SIGNALS

PATIENCE_SECONDS = 600
"""How long the processes have to finish a step and a checkpoint once they were asked to leave."""
ANSWERED = (2, 1)
"""Exit codes of a process that said itself why it ended: it was refused, or failed as nobody foresaw."""


def is_launched() -> bool:
    """Whether this process is one of several already, whoever started them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(config: Strict, section: str, processes: int) -> None:
    """Run a story with this configuration in so many processes of one thread each, and wait for their end.

    A signal goes to all of them: the first asks them to leave with a checkpoint, the second ends them at once. When one
    dies, the others are ended too, and `Refused` says which it was; when this one dies, all of them are (`tied`).
    """
    with TemporaryDirectory(prefix="sollune-") as folder:
        asked = Path(folder) / "config.yaml"
        asked.write_text(resolved_yaml(config, section), encoding="utf-8")
        together(tied("stages", section.replace("_", "-"), "--config", str(asked)), processes, folder)


def tied(module: str, *words: str) -> tuple[str, ...]:
    """Words for Python that run a module in a process that ends with this one, from before its first import on."""
    return ("-m", "configs.tied", str(os.getpid()), module, *words)


def together(words: Sequence[str], processes: int, folder: str) -> None:
    """Run Python with these words in so many processes that know of each other; `folder` is for the launcher's notes.

    Raises what is left to say of their end: `SystemExit` with its code after a signal or a refusal, else `Refused`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE_SECONDS))
    # The launcher of torch passes on whichever signals it is told to, and would undo `nohup` otherwise.
    passed = [number.name for number in SIGNALS if not is_ignored(number)]
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join([*passed, "SIGQUIT"]))
    for name in logging.root.manager.loggerDict:  # what there is to say is said here
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(_on_this_machine(processes, folder), sys.executable)(*words)
    except SignalException as told:
        raise SystemExit(128 + int(told.sigval)) from None
    except ChildFailedError as failed:
        raise _said(failed, processes) from None


def _on_this_machine(processes: int, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )


def _said(failed: ChildFailedError, processes: int) -> Refused | SystemExit:
    """What is left to say of processes that ended before their time."""
    ended: dict[int, Any] = failed.failures
    codes = {failure.exitcode for failure in ended.values()}
    if said := next((code for code in ANSWERED if code in codes), None):
        return SystemExit(said)
    rank, first = failed.get_first_failure()
    code = first.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Refused(
        f"process {rank} of {processes} {how}, so the others were ended too - the last checkpoint is whole; "
        "the same command goes on from it"
    )
