"""Paths and locations of a command line."""

from pathlib import Path

from configs.values import expand_home
from stages.system.refusal import Refused, format_value
from stages.system.storage.attached import attach_all
from stages.system.storage.locations import map_locations


def path_argument(text: str) -> Path:
    """A path of the command line, of a location its working folder, which is brought.

    Raises `Refused` for what can name no file.
    """
    try:
        path = expand_home(Path(map_locations(text)))
    except ValueError as error:
        raise Refused(f"{format_value(text)}: {error}") from error
    attach_all(path)
    return path


def location_argument(text: str) -> str:
    """A folder or hub id of the command line; raises `Refused` for what can name none."""
    return str(path_argument(text)) if text.startswith("~") or "://" in text else text
