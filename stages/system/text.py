"""Text files of users: UTF-8 and line ends, and JSON by its standard: no duplicate keys, no NaN, bounded numbers.

JSON of measurements may have numbers that are not finite.
"""

import codecs
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from stages.system.refusal import INVALID_CHARACTER, Refused, first_invalid_character, invalid_character_reason

MAX_BYTES = 1 << 30
OTHER_BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
SPECIAL_FILES = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
MAX_DIGITS = 1000
NUMBER = re.compile(r"\s*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan)\s*", re.IGNORECASE)
"""A decimal number as `float` takes it, finite or not."""


def split_number(word: str) -> tuple[str, float | None]:
    """A word NAME:NUMBER in two; the whole word and None where no number follows its last colon.

    Other colons are part of the name. The number need not be finite.
    """
    name, colon, number = word.rpartition(":")
    return (name, float(number)) if colon and NUMBER.fullmatch(number) else (word, None)


def split_lines(text: str) -> list[str]:
    """The lines of a text of `read_text`, which end at line feeds only."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def plain_file_bytes(path: Path, name: str, hint: str) -> int:
    """The size of a plain file; raises `Refused`, calling it `name`, for anything else and for no file."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise Refused(f"{name} does not exist{link} - {hint}") from error
    except OSError as error:
        raise Refused(f"{name}: cannot be read ({error.strerror}) - {hint}") from error
    except ValueError as error:
        raise Refused(f"{name!r}: is no file name ({error}) - {hint}") from error
    if kind := SPECIAL_FILES.get(stat.S_IFMT(status.st_mode)):
        raise Refused(f"{name}: is {kind}, not a file - {hint}")
    return status.st_size


def read_bytes(path: Path, name: str, hint: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a plain file; raises `Refused`, calling it `name`, for anything else and for too large a file."""
    content = None
    if plain_file_bytes(path, name, hint) <= max_bytes:
        try:
            # Without blocking: the file may have become a pipe since.
            with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK)) as file:
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise Refused(f"{name}: cannot be read ({error.strerror}) - {hint}") from error
    if content is None or len(content) > max_bytes:
        raise Refused(f"{name}: has more than {max_bytes:,} bytes - part it into smaller files")
    return content


def read_text(path: Path, name: str, hint: str, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file with line feeds as line ends, no byte-order mark, and invalid bytes as lone surrogates.

    Raises `Refused`, calling the file `name`, for another encoding and for NUL bytes.
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
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_clean_text(path: Path, name: str, hint: str, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file; raises `Refused` with the line of the first invalid character."""
    text = read_text(path, name, hint, max_bytes)
    if match := INVALID_CHARACTER.search(text):
        line = text.count("\n", 0, match.start()) + 1
        reason, character = invalid_character_reason(text), first_invalid_character(text)
        if reason == "not UTF-8":
            raise Refused(f"{name}:{line}: is not UTF-8 ({character}) - save it as UTF-8")
        raise Refused(f"{name}:{line}: text {reason} ({character}) - remove them")
    return text


def encoding_of(path: Path) -> str:
    """The encoding in which `read_text` reads a file."""
    with open(path, "rb") as file:
        return "UTF-8 without its byte-order mark" if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else "UTF-8"


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises `ValueError` with a short reason."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def parse_measurements(text: str) -> Any:
    """The value of a JSON text of measurements, null for a number that is not finite.

    Raises `ValueError` for a whole number that no float holds, and `RecursionError` for what is nested too deep.
    """
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite_or_none, parse_int=_measured_integer)


def _finite_or_none(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _measured_integer(digits: str) -> int:
    if not math.isfinite(float(digits)):
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is a duplicate key")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
