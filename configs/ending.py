"""How every command ends: with an exit code, and at most a few lines on standard error that say why, one each."""

import hashlib
import os
import select
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.characters import escaped
from configs.disk import WAYS_OUT, file_of, system_error, way_out
from configs.last_resort import account, is_for_memory
from configs.refusal import Refused
from configs.terminal import silence

FAILED, REFUSED, INTERRUPTED, READER_GONE = 1, 2, 130, 141


def ended(act: Callable[[], int], words: Sequence[str], folder: Callable[[], Path | None] = lambda: None) -> int:
    """Do it, and return the exit code: its own; 2 for bad input and for files that cannot be opened or written.

    It is 130 when interrupted, 141 when nobody reads any more, and 1 for an error that nobody foresaw, which is then
    written whole to a file in `folder`, the run's if one is known, or in the temporary folder. `SystemExit` passes.
    """
    with _threads_too(words, folder):
        try:
            try:
                code = act()
            except SystemExit:
                _flush()
                raise
            _flush()
            return code
        except Refused as refusal:
            return complain(str(refusal), REFUSED)
        except KeyboardInterrupt:
            return complain("interrupted - the same command goes on from here", INTERRUPTED)
        except Exception as error:
            return _failed(error, words, folder())


def complain(message: str, code: int) -> int:
    """Say why on standard error, each line of the message on one of its own; returns the code."""
    if _is_first_to_say(message):
        with suppress(OSError):  # standard error is gone, and the code still tells
            for line in message.split("\n"):
                print(f"sollune: {escaped(line)}", file=sys.stderr)
            sys.stderr.flush()
    return code


def _flush() -> None:
    """Hand over what was printed while a failure can still be shown."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise Refused(f"standard output: cannot be written ({error.strerror}) - {way_out(error)}") from error


def _failed(error: Exception, words: Sequence[str], folder: Path | None) -> int:
    if isinstance(error, BrokenPipeError) and _is_reader_gone():
        silence(sys.stdout)
        return READER_GONE
    if is_for_memory(error) or (found := system_error(error)) is None:
        return _unforeseen(error, words, folder)
    file = file_of(found)
    if file is None and found.errno in WAYS_OUT:  # files of ours are named by `writing`
        silence(sys.stdout)
        return complain(f"standard output, or a disk: {found.strerror} - {way_out(found)}", REFUSED)
    if file is None or _is_installed(file):
        return _unforeseen(error, words, folder)
    return complain(f"{file}: cannot be opened or written ({found.strerror}) - {way_out(found)}", REFUSED)


def _unforeseen(error: BaseException, words: Sequence[str], folder: Path | None) -> int:
    text = account(error, words, folder)
    return FAILED if text is None else complain(text, FAILED)


def _is_reader_gone() -> bool:
    """Whether standard output or error is a pipe whose other end is closed; it counts as one that cannot be asked."""
    try:
        asked = select.poll()
        for stream in (sys.stdout, sys.stderr):
            asked.register(stream.fileno(), select.POLLERR)
        return bool(asked.poll(0))
    except (OSError, ValueError):
        return True


def _is_installed(file: str) -> bool:
    """Whether a file belongs to a library: that it is missing is nothing that a user could have named."""
    places = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    return any(Path(file).absolute().is_relative_to(place) for place in places)


def _is_first_to_say(message: str) -> bool:
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
def _threads_too(words: Sequence[str], folder: Callable[[], Path | None]) -> Iterator[None]:
    """What ends a thread is shown like what ends the command; threads of libraries would print a traceback."""

    def hook(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            text = account(ended.exc_value, words, folder())
            if text is not None:
                complain(text, FAILED)

    earlier, threading.excepthook = threading.excepthook, hook
    try:
        yield
    finally:
        threading.excepthook = earlier
