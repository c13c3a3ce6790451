"""A folder that takes the place of an earlier export whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from configs.atomic import PARTIAL, fsync_folder, is_left_over, unfinished
from configs.disk import system_error, unwritable
from configs.refusal import Refused, in_one_line
from stages.export.ours import refuse_changed

EARLIER = ".earlier"


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well and is removed when it does not.

    What others added to the earlier one goes with it (`keep_added`). Raises `Refused` where `final` is no export of
    ours, or was changed since.
    """
    refuse_changed(final)
    temporary = unfinished(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _tidy(final)
        temporary.mkdir()
        yield temporary
        _swap(temporary, final)
    except (OSError, SafetensorError) as error:
        if found := system_error(error):
            raise unwritable(final, found) from error
        raise Refused(f"{final}: cannot be written ({in_one_line(error)}) - run the same command again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tidy(final: Path) -> None:
    """Remove what killed exports left half-written; what one had moved aside comes back if nothing took its place."""
    for left in final.parent.glob(f".{final.name}.*{PARTIAL}"):
        if is_left_over(left):
            shutil.rmtree(left, ignore_errors=True)
    for left in final.parent.glob(f".{final.name}.*{EARLIER}"):
        if is_left_over(left.with_suffix(PARTIAL)):
            if final.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(final)


def _swap(new: Path, final: Path) -> None:
    """Put `new` in the place of `final`; the earlier one comes back if that fails, and goes if it does not."""
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    earlier = new.with_suffix(EARLIER)
    if final.exists():
        final.rename(earlier)
    try:
        new.rename(final)
    except OSError:
        if earlier.exists():
            earlier.rename(final)
        raise
    fsync_folder(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)
