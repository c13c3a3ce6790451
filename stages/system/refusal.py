"""Characters that belong in no sentence, and how a value is shown on one line.

The one way to say no to a user.

The parser of commands that read their own words: it refuses in one line, where argparse prints its usage too.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

MAX_SHOWN_CHARACTERS = 60
INVALID_CHARACTERS = {
    "not UTF-8": "\udc80-\udcff",  # where Python keeps bytes that it cannot decode
    "with lone surrogates": "\ud800-\udc7f\udd00-\udfff",
    "with control characters": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    "with bidirectional controls": "\u202a-\u202e\u2066-\u2069",
    "with a byte-order mark inside": "\ufeff",
    "with noncharacters": "\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)),
}
"""Reason -> the characters that make a sentence unusable; tab, line feed and carriage return are allowed."""
INVALID_CHARACTER = re.compile(f"[{''.join(INVALID_CHARACTERS.values())}]")


def invalid_character_reason(text: str) -> str | None:
    """Why a text cannot be used, by the first character that does not belong in it; none for a good text."""
    match = INVALID_CHARACTER.search(text)
    if match is None:
        return None
    return next(
        reason for reason, characters in INVALID_CHARACTERS.items() if re.match(f"[{characters}]", match.group())
    )


def first_invalid_character(text: str) -> str:
    """The first character that does not belong in a text: U+0007, or byte FF of what is not UTF-8; else nothing."""
    match = INVALID_CHARACTER.search(text)
    if match is None:
        return ""
    code = ord(match.group())
    return f"byte {code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"


def format_value(value: object) -> str:
    """A value for a message: on one line, without characters that a terminal obeys, and not too long."""
    words = value if isinstance(value, str) else repr(value)
    if not words.isprintable() or words == "" or words != words.strip():
        words = repr(words)
    return words if len(words) <= MAX_SHOWN_CHARACTERS else f"{words[:MAX_SHOWN_CHARACTERS]}..."


def escape_unprintable(text: str) -> str:
    """A text of any length without characters that a terminal obeys: each is shown as its escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Refused(Exception):
    """Bad input, told in one line that names the thing, its value and the way out; the door exits with 2."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The known name nearest to a mistyped one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def in_one_line(error: BaseException, max_characters: int = 200) -> str:
    """What an exception says, on one line of at most so many letters; its kind where it says nothing."""
    words = escape_unprintable(" ".join(str(error).split())) or type(error).__name__
    return words if len(words) <= max_characters else f"{words[:max_characters]}..."


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints are refusals; parsers of its subcommands are of this kind too."""

    def error(self, message: str) -> NoReturn:
        """Raise `Refused` with what is wrong."""
        command = self.prog.removeprefix("sollune ")
        raise Refused(f"{command}: {' '.join(message.split())} - {self.prog} --help lists what it takes")
