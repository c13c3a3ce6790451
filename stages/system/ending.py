"""What nobody foresaw: written whole to a file, and shown in one line with where it is and what to try.

How every command ends: with an exit code, and at most a few lines on standard error that say why, one each.
"""

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
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.system.disk import HINTS, hint_for, path_of_error, system_error
from stages.system.refusal import Refused, escape_unprintable, in_one_line
from stages.system.terminal import redirect_to_devnull

REPORT_PREFIX = "sollune-error-"
SECRET_NAME = re.compile(r"token|key|secret|passw|credential|auth", re.IGNORECASE)
"""In the name of an option or of a variable of the environment whose value is nobody's business."""
SECRET_VALUE = re.compile(
    r"\b(?:hf_|api_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-)[\w-]{6,}|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"
)
"""Words that are secrets by their form: tokens of the hub and their like, and name and password before a host."""
MIN_SECRET_CHARACTERS = 6
"""Letters: a shorter value of a variable would be struck out of ordinary words."""
REDACTED = "***"
REPORTED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_RANK",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "WORLD_SIZE",
)
"""Variables of the environment that change how a run ends."""
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "zarr")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|alloc_failed", re.IGNORECASE)
MEMORY_HINTS = {
    "cache-teacher": "lower render.batch_size",
    "distill": "raise train.accumulate, which leaves the batch as it is, or lower train.batch_size",
    "finetune-classes": "raise train.accumulate, which leaves the batch as it is, or lower render.batch_size",
    "evaluate": "lower fidelity.prompts and paired.prompts",
}
"""Command -> what makes it take less memory."""


def write_error_report(error: BaseException, argv: Sequence[str], folder: Path | None) -> str | None:
    """Write down all that is known of an error and return the line for the terminal.

    The file goes into `folder`, the run's, or else into the temporary one; where neither takes it, standard error does.
    Of several processes that share a run the first one speaks, the others add to its file: None.
    """
    text = redact(_report_text(error, argv))
    shared = os.environ.get("TORCHELASTIC_RUN_ID")
    own = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{os.getpid()}"
    for place in [*([folder] if folder else []), Path(tempfile.gettempdir())]:
        file = place / f"{REPORT_PREFIX}{shared or own}.txt"
        try:
            with open(file, "x", encoding="utf-8", errors="backslashreplace") as new:
                new.write(text)
            return summary_line(error, argv, f"{file} holds all of it")
        except FileExistsError:  # only a shared name is there already
            with open(file, "a", encoding="utf-8", errors="backslashreplace") as others:
                others.write(f"\n{text}")
            return None
        except OSError:
            continue
    print(text, file=sys.stderr)
    return summary_line(error, argv, "all of it stands above, no file could be written")


def summary_line(error: BaseException, argv: Sequence[str], report_location: str) -> str:
    """One line: what happened, where all of it is, and what to try."""
    said = redact(in_one_line(error))
    kind = type(error).__name__
    what = kind if said == kind else f"{kind}: {said}"
    if is_out_of_memory(error):
        less = MEMORY_HINTS.get(next(iter(argv), ""), "ask for less at once")
        return f"out of memory ({what}) - {less}, or end other programs; {report_location}"
    return (
        f"{what} - not foreseen: try the same command again, and report it with the file if it comes again; "
        f"{report_location}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of this machine or of a GPU."""
    is_torch = isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or is_torch


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without what looks like a secret, or is the value of a variable whose name says so."""
    for name, value in environment.items():
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARACTERS:
            text = text.replace(value, REDACTED)
    return SECRET_VALUE.sub(REDACTED, text)


def redact_arguments(argv: Sequence[str]) -> list[str]:
    """The words of a command without the values of options that name a secret."""
    shown, hides = list[str](), False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = word.startswith("-") and bool(SECRET_NAME.search(name))
        shown.append(
            REDACTED if hides and not word.startswith("-") else f"{name}={REDACTED}" if secret and equals else word
        )
        hides = secret and not equals
    return shown


def _report_text(error: BaseException, argv: Sequence[str]) -> str:
    libraries = [f"{name} {_version(name)}" for name in LIBRARIES if name in sys.modules]
    environment = [f"{name}={os.environ[name]}" for name in REPORTED_VARIABLES if name in os.environ]
    facts = {
        "command": " ".join(["sollune", *map(repr, redact_arguments(argv))]),
        "version": f"sollune {_version('sollune')}",
        "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "platform": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "libraries": ", ".join(libraries) or "none imported",
        "environment": ", ".join(environment) or "nothing that matters",
        "folder": os.path.realpath(os.curdir),
    }
    text = "".join(f"{name:<12} {value}\n" for name, value in facts.items())
    return f"{text}\n{''.join(traceback.format_exception(error))}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


def run_to_exit_code(
    action: Callable[[], int], argv: Sequence[str], folder: Callable[[], Path | None] = lambda: None
) -> int:
    """Do it, and return the exit code: its own; 2 for bad input and for files that cannot be opened or written.

    It is 130 when interrupted, 141 when nobody reads any more, and 1 for an error that nobody foresaw, which is then
    written whole to a file in `folder`, the run's if one is known, or in the temporary folder. `SystemExit` passes.
    """
    with _report_thread_errors(argv, folder):
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
            return _handle_exception(error, argv, folder())


def print_error(message: str, code: int) -> int:
    """Say why on standard error, each line of the message on one of its own; returns the code."""
    if _is_first_to_report(message):
        with suppress(OSError):  # standard error is gone, and the code still tells
            for line in message.split("\n"):
                print(f"sollune: {escape_unprintable(line)}", file=sys.stderr)
            sys.stderr.flush()
    return code


def _flush_stdout() -> None:
    """Hand over what was printed while a failure can still be shown."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        redirect_to_devnull(sys.stdout)
        raise Refused(f"standard output: cannot be written ({error.strerror}) - {hint_for(error)}") from error


def _handle_exception(error: Exception, argv: Sequence[str], folder: Path | None) -> int:
    if isinstance(error, BrokenPipeError) and _is_pipe_closed():
        redirect_to_devnull(sys.stdout)
        return EXIT_BROKEN_PIPE
    if is_out_of_memory(error) or (found := system_error(error)) is None:
        return _report_unexpected(error, argv, folder)
    file = path_of_error(found)
    if file is None and found.errno in HINTS:  # files of ours are named by `writing`
        redirect_to_devnull(sys.stdout)
        return print_error(f"standard output, or a disk: {found.strerror} - {hint_for(found)}", EXIT_REFUSED)
    if file is None or _is_library_file(file):
        return _report_unexpected(error, argv, folder)
    return print_error(f"{file}: cannot be opened or written ({found.strerror}) - {hint_for(found)}", EXIT_REFUSED)


def _report_unexpected(error: BaseException, argv: Sequence[str], folder: Path | None) -> int:
    text = write_error_report(error, argv, folder)
    return EXIT_FAILED if text is None else print_error(text, EXIT_FAILED)


def _is_pipe_closed() -> bool:
    """Whether standard output or error is a pipe whose other end is closed; it counts as one that cannot be asked."""
    try:
        asked = select.poll()
        for stream in (sys.stdout, sys.stderr):
            asked.register(stream.fileno(), select.POLLERR)
        return bool(asked.poll(0))
    except (OSError, ValueError):
        return True


def _is_library_file(file: str) -> bool:
    """Whether a file belongs to a library: that it is missing is nothing that a user could have named."""
    places = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    return any(Path(file).absolute().is_relative_to(place) for place in places)


def _is_first_to_report(message: str) -> bool:
    """Whether no other process of a launched run has said the same; all of them share a folder of the launcher."""
    notes = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not notes:
        return True
    said = Path(notes).parent.parent / f"said-{hashlib.sha256(message.encode('utf-8', 'replace')).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _report_thread_errors(argv: Sequence[str], folder: Callable[[], Path | None]) -> Iterator[None]:
    """What ends a thread is shown like what ends the command; threads of libraries would print a traceback."""

    def hook(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            text = write_error_report(ended.exc_value, argv, folder())
            if text is not None:
                print_error(text, EXIT_FAILED)

    earlier, threading.excepthook = threading.excepthook, hook
    try:
        yield
    finally:
        threading.excepthook = earlier
