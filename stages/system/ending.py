"""How a command ends: its exit code, one line on standard error, and for unexpected errors a report file."""

import hashlib
import os
import platform
import re
import select
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.system.disk import HINTS, hint_for, path_of_error, system_error
from stages.system.refusal import Refused, escape_unprintable, in_one_line
from stages.system.storage.locations import show_locations
from stages.system.terminal import redirect_to_devnull

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141
REPORT_PREFIX = "sollune-error-"
SECRET_NAME = re.compile(r"token|key|secret|passw|credential|auth", re.IGNORECASE)
"""In the name of an option or environment variable whose value must not be reported."""
SECRET_VALUE = re.compile(
    r"\b(?:hf_|api_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-)[\w-]{6,}|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"
)
"""Secrets by their form: tokens of the hub and similar ones, and name and password before a host."""
MIN_SECRET_CHARACTERS = 6
"""A shorter value of a variable would be removed from ordinary words."""
REDACTED = "***"
REPORTED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE",
)  # fmt: skip
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "zarr")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|alloc_failed", re.IGNORECASE)
MEMORY_HINT = "ask for less at once"


def run_to_exit_code(
    action: Callable[[], int],
    argv: Sequence[str],
    folder: Callable[[], Path | None] = lambda: None,
    memory_hint: str = MEMORY_HINT,
) -> int:
    """Run a command and return its exit code, or 2 for bad input and for files that cannot be opened or written.

    130 means interrupted, 141 that standard output was closed, and 1 an unexpected error, which is written to a file
    in `folder`, the run's, or else in the temporary folder; `memory_hint` is the advice when memory runs out.
    `SystemExit` passes.
    """
    reporter = _Reporter(argv, folder, memory_hint)
    with _report_thread_errors(reporter):
        try:
            try:
                code = action()
            except SystemExit:
                _flush_stdout()
                raise
            _flush_stdout()
            return code
        except Refused as refusal:
            return print_error(str(refusal), EXIT_REFUSED)
        except KeyboardInterrupt:
            return print_error("interrupted - the same command goes on from here", EXIT_INTERRUPTED)
        except Exception as error:
            return _handle_exception(error, reporter)


def print_error(message: str, code: int) -> int:
    """Print each line of the message to standard error as one line; returns the code."""
    if _is_first_to_report(message):
        with suppress(OSError):  # standard error is closed
            for line in show_locations(message).split("\n"):
                print(f"sollune: {escape_unprintable(line)}", file=sys.stderr)
            sys.stderr.flush()
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of this machine or of a GPU."""
    is_torch = isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_torch


def installed_version(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without what looks like a secret, and without values of variables whose names look like one's."""
    for name, value in environment.items():
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARACTERS:
            text = text.replace(value, REDACTED)
    return SECRET_VALUE.sub(REDACTED, text)


def redact_arguments(argv: Sequence[str]) -> list[str]:
    """A command line without the values of options that name a secret."""
    redacted, is_secret_value = list[str](), False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("-")
        is_secret = is_option and bool(SECRET_NAME.search(name))
        if is_secret and equals:
            word = f"{name}={REDACTED}"
        elif is_secret_value and not is_option:
            word = REDACTED
        redacted.append(word)
        is_secret_value = is_secret and not equals
    return redacted


@dataclass(frozen=True)
class _Reporter:
    """Writes reports of the unexpected errors of one command."""

    argv: Sequence[str]
    folder: Callable[[], Path | None]
    memory_hint: str

    def report(self, error: BaseException) -> int:
        """Write a report file, and one line about it to standard error; where no file can be written, all goes there.

        Of several processes of one run the first prints the line, the others append to its file.
        """
        text = redact(self._details(error))
        name = os.environ.get("TORCHELASTIC_RUN_ID") or f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.getpid()}"
        for folder in (self.folder(), Path(tempfile.gettempdir())):
            if folder is None:
                continue
            file = folder / f"{REPORT_PREFIX}{name}.txt"
            try:
                with open(file, "x", encoding="utf-8", errors="backslashreplace") as report:
                    report.write(text)
            except FileExistsError:  # of another process of this run
                with open(file, "a", encoding="utf-8", errors="backslashreplace") as report:
                    report.write(f"\n{text}")
                return EXIT_FAILED
            except OSError:
                continue
            return print_error(self._summary(error, f"{file} holds all of it"), EXIT_FAILED)
        print(text, file=sys.stderr)
        return print_error(self._summary(error, "all of it stands above, no file could be written"), EXIT_FAILED)

    def _summary(self, error: BaseException, report_location: str) -> str:
        message, kind = redact(in_one_line(error)), type(error).__name__
        problem = kind if message == kind else f"{kind}: {message}"
        if is_out_of_memory(error):
            return f"out of memory ({problem}) - {self.memory_hint}, or end other programs; {report_location}"
        return (
            f"{problem} - not foreseen: try the same command again, and report it with the file if it comes again; "
            f"{report_location}"
        )

    def _details(self, error: BaseException) -> str:
        libraries = [f"{name} {installed_version(name)}" for name in LIBRARIES if name in sys.modules]
        environment = [f"{name}={os.environ[name]}" for name in REPORTED_VARIABLES if name in os.environ]
        facts = {
            "command": " ".join(["sollune", *map(repr, redact_arguments(self.argv))]),
            "version": f"sollune {installed_version('sollune')}",
            "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            "platform": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
            "libraries": ", ".join(libraries) or "none imported",
            "environment": ", ".join(environment) or "nothing that matters",
            "folder": os.path.realpath(os.curdir),
        }
        text = "".join(f"{name:<12} {value}\n" for name, value in facts.items())
        return f"{text}\n{''.join(traceback.format_exception(error))}"


def _handle_exception(error: Exception, reporter: _Reporter) -> int:
    if isinstance(error, BrokenPipeError) and _is_pipe_closed():
        redirect_to_devnull(sys.stdout)
        return EXIT_BROKEN_PIPE
    cause = None if is_out_of_memory(error) else system_error(error)
    if cause is None:
        return reporter.report(error)
    file = path_of_error(cause)
    if file is None and cause.errno in HINTS:  # our own files are named by `refuse_write_errors`
        redirect_to_devnull(sys.stdout)
        return print_error(f"standard output, or a disk: {cause.strerror} - {hint_for(cause)}", EXIT_REFUSED)
    if file is None or _is_library_file(file):
        return reporter.report(error)
    return print_error(f"{file}: cannot be opened or written ({cause.strerror}) - {hint_for(cause)}", EXIT_REFUSED)


@contextmanager
def _report_thread_errors(reporter: _Reporter) -> Iterator[None]:
    """Report what ends a thread like what ends the command; Python would print a traceback."""

    def report(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
            reporter.report(failure.exc_value)

    previous, threading.excepthook = threading.excepthook, report
    try:
        yield
    finally:
        threading.excepthook = previous


def _flush_stdout() -> None:
    """Write what was printed while a failure can still be reported."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        redirect_to_devnull(sys.stdout)
        raise Refused(f"standard output: cannot be written ({error.strerror}) - {hint_for(error)}") from error


def _is_pipe_closed() -> bool:
    """Whether standard output or error is a closed pipe; a stream that cannot be polled counts as one."""
    try:
        poll = select.poll()
        for stream in (sys.stdout, sys.stderr):
            poll.register(stream.fileno(), select.POLLERR)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True


def _is_library_file(file: str) -> bool:
    """Whether a file belongs to an installed library, so that its absence is no mistake of the user."""
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    return any(Path(file).absolute().is_relative_to(folder) for folder in folders)


def _is_first_to_report(message: str) -> bool:
    """Whether no other process of a launched run has printed this message; they share a folder of the launcher."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        digest = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()[:16]
        try:
            (Path(error_file).parent.parent / f"said-{digest}").touch(exist_ok=False)
        except OSError as error:
            return not isinstance(error, FileExistsError)
    return True
