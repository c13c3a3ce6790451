"""A folder that takes the place of an earlier export whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from configs.atomic import fsync_folder
from configs.refusal import Refused

FACTS = "sollune.json"
"""What the folder says of itself; by it an export of ours is known."""


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its place when the block ends well and is removed when it does not."""
    if final.exists() and not (final / FACTS).is_file():
        raise Refused(
            f"{final}: stands in the way and is no export of ours ({FACTS} is missing) - move it, or set --out"
        )
    temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _swap(temporary, final)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refused(f"{final}: cannot be written ({reason}) - free some space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, final: Path) -> None:
    """Put `new` in the place of `final`; the earlier one comes back if that fails, and goes if it does not."""
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    earlier = new.with_suffix(".earlier")
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
