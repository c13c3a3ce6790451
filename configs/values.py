"""Values as users write them: text is text, numbers have a measure, and `~` is a home folder wherever a path stands."""

import os
from pathlib import Path
from typing import Any

from configs.characters import fault_of, faulty_character, printable
from configs.refusal import Refused

LARGEST = (1 << 63) - 1
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""In bytes, as Linux has them."""


def expand_home(path: Path) -> Path:
    """The path with a leading `~` or `~user` opened; raises `ValueError` for what can name no file."""
    if fault := fault_of(str(path)):
        raise ValueError(f"a file name {fault} ({faulty_character(str(path))}) - rename it")
    if "\n" in str(path) or "\r" in str(path):
        raise ValueError("a file name of several lines - rename it")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no user {path.parts[0][1:]!r} here - write the whole path") from error
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise ValueError(f"a file name of more than {LONGEST_NAME} bytes - take a shorter one")
    return path


def expand_location(words: str) -> str:
    """A folder or a hub id, the folder's `~` opened: no hub id begins with one, nor is as long as no name can be."""
    return str(expand_home(Path(words))) if words.startswith("~") or len(words) > LONGEST_NAME else words


def place(word: str) -> Path:
    """A path of the command line; raises `Refused` for what can name no file."""
    try:
        return expand_home(Path(word))
    except ValueError as error:
        raise Refused(f"{printable(word)}: {error}") from error


def location(word: str) -> str:
    """A folder or hub id of the command line; raises `Refused` for what can name none."""
    return str(place(word)) if word.startswith("~") else word


def plain(value: Any) -> Any:
    """The value with every path in it opened; raises `ValueError` for what no user can mean."""
    match value:
        case Path():
            return expand_home(value)
        case str() if fault := fault_of(value):
            raise ValueError(f"text {fault} ({faulty_character(value)}) - remove them")
        case bool() | str():
            return value
        case int() if abs(value) > LARGEST:
            raise ValueError("should fit 64 bits - take a smaller number")
        case tuple() if type(value) is tuple:
            return tuple(map(plain, value))
        case list():
            return [plain(one) for one in value]
        case dict():
            return {plain(key): plain(one) for key, one in value.items()}
    return value


def refuse_blank(value: str) -> str:
    """The value; raises `ValueError` for nothing but white space."""
    if not value.strip():
        raise ValueError("should be a word or more")
    return value
