"""Text files of users: how they are encoded, and where their lines end."""

import os
import stat
from pathlib import Path

from configs.characters import FAULTY, fault_of, faulty_character
from configs.refusal import Refused

MOST_BYTES = 1 << 30
UTF8_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def lines_of(text: str) -> list[str]:
    """The lines of a text that `read_text` has read: they end at line feeds and nowhere else."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def size_of(path: Path, name: str, way_out: str) -> int:
    """The bytes of a plain file; raises `Refused`, calling it `name`, for a folder, a pipe, a device and nothing."""
    try:
        state = path.stat()
    except FileNotFoundError as error:
        link = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise Refused(f"{name} does not exist{link} - {way_out}") from error
    except OSError as error:
        raise Refused(f"{name}: cannot be read ({error.strerror}) - {way_out}") from error
    except ValueError as error:
        raise Refused(f"{name!r}: is no file name ({error}) - {way_out}") from error
    for is_kind, what in KINDS:
        if is_kind(state.st_mode):
            raise Refused(f"{name}: is {what}, not a file - {way_out}")
    return state.st_size


def read_bytes(path: Path, name: str, way_out: str, most: int = MOST_BYTES) -> bytes:
    """The content of a plain file; raises `Refused`, calling it `name`, for what is none, and for what is too large."""
    content = None
    if size_of(path, name, way_out) <= most:
        try:
            # Without waiting: the file may have become a pipe since.
            with open(path, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NONBLOCK)) as file:
                content = file.read(most + 1)
        except OSError as error:
            raise Refused(f"{name}: cannot be read ({error.strerror}) - {way_out}") from error
    if content is None or len(content) > most:
        raise Refused(f"{name}: has more than {most:,} bytes - part it into smaller files")
    return content


def read_text(path: Path, name: str, way_out: str, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file, its lines ended by line feeds, bytes that are not UTF-8 kept as lone surrogates.

    A byte-order mark is dropped. Raises `Refused`, calling the file `name`, for another encoding and for NUL bytes.
    """
    content = read_bytes(path, name, way_out, most)
    for mark, encoding in OTHER_MARKS.items():
        if content.startswith(mark):
            raise Refused(f"{name}: is not UTF-8 but {encoding} text, by its byte-order mark - save it as UTF-8")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise Refused(
            f"{name}:{line}: holds NUL bytes: it is UTF-16 without a byte-order mark, or no text - save it as UTF-8"
        )
    text = content.removeprefix(UTF8_MARK).decode("utf-8", errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_clean_text(path: Path, name: str, way_out: str, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file; raises `Refused` with the line of the first character that does not belong in it."""
    text = read_text(path, name, way_out, most)
    if match := FAULTY.search(text):
        line, reason = text.count("\n", 0, match.start()) + 1, fault_of(match.group())
        where = f"{name}:{line}"
        if reason == "not UTF-8":
            raise Refused(f"{where}: is not UTF-8 ({faulty_character(text)}) - save it as UTF-8")
        raise Refused(f"{where}: text {reason} ({faulty_character(text)}) - remove them")
    return text


def encoding_of(path: Path) -> str:
    """How `read_text` reads a file."""
    with open(path, "rb") as file:
        return "UTF-8 without its byte-order mark" if file.read(len(UTF8_MARK)) == UTF8_MARK else "UTF-8"
