"""Where the parts of a GPU run are executed: in this process, or in one that can be ended when it does not stop."""

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.gpu_report import Budget, BudgetUsed, Outcome, Part, RecordFigures, Report
from stages.system.ending import is_out_of_memory
from stages.system.refusal import Refused, in_one_line
from stages.system.tied import tie_to_parent

GRACE_SECONDS = 15.0
"""After its budget, for a part that looks at its budget between two steps."""
END_SECONDS = 10.0
ERROR_CHARACTERS = 300
FIRST_SIGNAL = 128
"""Exit codes above are those of signals."""
DEVICE_FAULTS = ("AcceleratorError", "CUDA error", "cuDNN error", "CUBLAS_STATUS", "device-side assert")
"""In errors after which a process cannot use its GPU any more, or not be trusted to."""


class Executor(Protocol):
    """Runs one part after the other."""

    def run(self, part: Part, seconds: float, limit_seconds: float, record: RecordFigures) -> Outcome:
        """Run a part with a budget, for `limit_seconds` at most where it can be ended."""
        ...

    def close(self) -> None:
        """Give back memory and processes; the next part starts anew."""
        ...


def execute(part: Part, world: Any, seconds: float, record: RecordFigures) -> Outcome:
    """Run a part here; its errors become one line, and what it held is given back."""
    try:
        module, _, function = part.run.partition(":")
        getattr(importlib.import_module(module), function)(world, Budget(seconds), record)
        outcome = Outcome("done")
    except BudgetUsed as end:
        outcome = Outcome("budget used", str(end))
    except SystemExit as left:
        if isinstance(left.code, int) and left.code > FIRST_SIGNAL:  # the training loop ends so on a signal
            raise KeyboardInterrupt from left
        outcome = failure(left)
    except Exception as error:
        outcome = failure(error)
    # Only here is the error gone, which holds the tensors of every frame that it passed.
    try:
        world.release()
    except Exception as error:
        return outcome if outcome.status == "failed" else failure(error)
    return outcome


def failure(error: BaseException) -> Outcome:
    """The outcome of a part that raised this error."""
    text = in_one_line(error, ERROR_CHARACTERS)
    kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
    line = text if isinstance(error, Refused) or text == kind else f"{kind}: {text}"
    is_fault = any(sign in f"{type(error).__name__}: {error}" for sign in DEVICE_FAULTS)
    return Outcome("failed", line, breaks_device=is_fault and not is_out_of_memory(error))


class InProcess:
    """Parts run in this process: nothing can be ended but by its own budget."""

    def __init__(self, settings: Any) -> None:
        self._settings, self._world = settings, None

    def run(self, part: Part, seconds: float, limit_seconds: float, record: RecordFigures) -> Outcome:
        """Run a part."""
        self._world = self._world or self._settings.open()
        return execute(part, self._world, seconds, record)

    def close(self) -> None:
        """Forget what was loaded."""
        self._world = None


class OwnProcess:
    """Parts run in another process, which keeps what it loaded until it is closed, ended, or broken by a part."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, part: Part, seconds: float, limit_seconds: float, record: RecordFigures) -> Outcome:
        """Run a part; its process is killed at the limit, and a new one serves the next part."""
        end = time.monotonic() + limit_seconds
        connection = self._connection or self._start()
        try:
            connection.send((part, time.monotonic() + seconds))  # a clock of the machine, the same in both
            while connection.poll(max(0.0, end - time.monotonic())):
                kind, content = connection.recv()
                if kind == "figures":
                    record(content)
                elif kind == "end":
                    if content.breaks_device:
                        self.close()
                    return content  # type: ignore[no-any-return]
        except (EOFError, OSError):
            code = self._end_process()
            how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
            return Outcome("failed", f"its process ended {how}")
        self._end_process()
        return Outcome("killed", f"did not stop within {limit_seconds:.0f} s, so its process was ended")

    def close(self) -> None:
        """Let the process end, or end it."""
        self._end_process(patience=END_SECONDS)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._settings, os.getpid()), name="gpu")
        self._process.start()
        theirs.close()
        return self._connection

    def _end_process(self, patience: float = 0.0) -> int | None:
        """End the process; returns its exit code if it had ended by itself."""
        if self._connection is not None:
            self._connection.close()  # an idle process ends at that
            self._connection = None
        if self._process is None:
            return None
        self._process.join(patience or 1.0)
        code: int | None = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._process = None
        return code


def serve(connection: Connection, settings: Any, parent: int) -> None:
    """Run the parts that are sent, until the connection is closed."""
    tie_to_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    world = None
    with suppress(EOFError, OSError):
        while True:
            part, end = connection.recv()
            try:
                world = world or settings.open()
            except (Exception, SystemExit) as error:
                connection.send(("end", failure(error)))
                continue
            outcome = execute(
                part, world, end - time.monotonic(), lambda figures: connection.send(("figures", dict(figures)))
            )
            connection.send(("end", outcome))


def run_parts(parts: Sequence[Part], report: Report, executor: Executor, seconds: float, scale: float = 1.0) -> None:
    """Run the parts in their order within `seconds`; `scale` stretches their budgets.

    What a new process needs to start counts in the budget of its first part.
    """
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if left < part.least_seconds:
            report.leave_out(part.name, f"{max(0.0, left):.0f} s of the run left, it needs {part.least_seconds:.0f} s")
            continue
        if part.alone:
            executor.close()
        budget = min(part.seconds * scale, left)
        report.begin(part.name, budget)
        report.end(part.name, executor.run(part, budget, min(budget + GRACE_SECONDS, left), _recorder(report, part)))
        if part.alone:
            executor.close()


def _recorder(report: Report, part: Part) -> RecordFigures:
    def record(figures: Mapping[str, Any]) -> None:
        report.record(part.name, figures)

    return record
