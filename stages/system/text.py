"""Text files of users: how they are encoded, and where their lines end.

JSON as the standard has it: no key twice, no NaN, no number or nesting without measure.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from stages.system.refusal import INVALID_CHARACTER, Refused, first_invalid_character, invalid_character_reason

MAX_BYTES = 1 << 30
UTF8_BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
SPECIAL_FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def split_lines(text: str) -> list[str]:
    """The lines of a text that `read_text` has read: they end at line feeds and nowhere else."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def plain_file_bytes(path: Path, name: str, hint: str) -> int:
    """The bytes of a plain file; raises `Refused`, calling it `name`, for a folder, a pipe, a device and nothing."""
    try:
        state = path.stat()
    except FileNotFoundError as error:
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise Refused(f"{name} does not exist{link} - {hint}") from error
    except OSError as error:
        raise Refused(f"{name}: cannot be read ({error.strerror}) - {hint}") from error
    except ValueError as error:
        raise Refused(f"{name!r}: is no file name ({error}) - {hint}") from error
    for is_kind, what in SPECIAL_FILE_KINDS:
        if is_kind(state.st_mode):
            raise Refused(f"{name}: is {what}, not a file - {hint}")
    return state.st_size


def read_bytes(path: Path, name: str, hint: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a plain file; raises `Refused`, calling it `name`, for what is none, and for what is too large."""
    content = None
    if plain_file_bytes(path, name, hint) <= max_bytes:
        try:
            # Without waiting: the file may have become a pipe since.
            with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK)) as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise Refused(f"{name}: cannot be read ({error.strerror}) - {hint}") from error
    if content is None or len(content) > max_bytes:
        raise Refused(f"{name}: has more than {max_bytes:,} bytes - part it into smaller files")
    return content


def read_text(path: Path, name: str, hint: str, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, its lines ended by line feeds, bytes that are not UTF-8 kept as lone surrogates.

    A byte-order mark is dropped. Raises `Refused`, calling the file `name`, for another encoding and for NUL bytes.
    """
    content = read_bytes(path, name, hint, max_bytes)
    for mark, encoding in OTHER_BOMS.items():
        if content.startswith(mark):
            raise Refused(f"{name}: is not UTF-8 but {encoding} text, by its byte-order mark - save it as UTF-8")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise Refused(
            f"{name}:{line}: holds NUL bytes: it is UTF-16 without a byte-order mark, or no text - save it as UTF-8"
        )
    text = content.removeprefix(UTF8_BOM).decode("utf-8", errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_clean_text(path: Path, name: str, hint: str, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file; raises `Refused` with the line of the first character that does not belong in it."""
    text = read_text(path, name, hint, max_bytes)
    if match := INVALID_CHARACTER.search(text):
        line, reason = text.count("\n", 0, match.start()) + 1, invalid_character_reason(match.group())
        where = f"{name}:{line}"
        if reason == "not UTF-8":
            raise Refused(f"{where}: is not UTF-8 ({first_invalid_character(text)}) - save it as UTF-8")
        raise Refused(f"{where}: text {reason} ({first_invalid_character(text)}) - remove them")
    return text


def encoding_of(path: Path) -> str:
    """How `read_text` reads a file."""
    with open(path, "rb") as file:
        return "UTF-8 without its byte-order mark" if file.read(len(UTF8_BOM)) == UTF8_BOM else "UTF-8"


MAX_DIGITS = 1000


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises `ValueError` with a short reason."""
    try:
        return json.loads(
            text, object_pairs_hook=_build_object, parse_constant=_refuse_constant, parse_int=_parse_integer
        )
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is said twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
