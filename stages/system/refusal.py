"""Bad input: the exception that refuses it, and how text of users is checked and shown on one line."""

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
"""Reason -> the characters that make a text unusable; tab, line feed and carriage return are allowed."""
INVALID_CHARACTER = re.compile(f"[{''.join(INVALID_CHARACTERS.values())}]")


class Refused(Exception):
    """Bad input, as one line "thing: value or problem - way out"; the command exits with 2."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, also of subcommands, that raises `Refused` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `Refused` with what is wrong."""
        command = self.prog.removeprefix("sollune ")
        raise Refused(f"{command}: {' '.join(message.split())} - {self.prog} --help lists what it takes")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The known name nearest to a mistyped one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def invalid_character_reason(text: str) -> str | None:
    """Why a text cannot be used, by its first invalid character; None for a valid text."""
    if match := INVALID_CHARACTER.search(text):
        return next(why for why, letters in INVALID_CHARACTERS.items() if re.match(f"[{letters}]", match.group()))
    return None


def first_invalid_character(text: str) -> str:
    """The first invalid character of a text: U+0007, or byte FF of what is not UTF-8; empty for a valid text."""
    match = INVALID_CHARACTER.search(text)
    if match is None:
        return ""
    code = ord(match.group())
    return f"byte {code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"


def format_value(value: object) -> str:
    """A value for a message: on one line, without control characters, at most `MAX_SHOWN_CHARACTERS` long."""
    text = value if isinstance(value, str) else repr(value)
    if not text.isprintable() or text == "" or text != text.strip():
        text = repr(text)
    return _truncate(text, MAX_SHOWN_CHARACTERS)


def escape_unprintable(text: str) -> str:
    """A text of any length with each unprintable character replaced by its escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def in_one_line(error: BaseException, max_characters: int = 200) -> str:
    """An exception's message on one line of at most `max_characters`; its class name where the message is empty."""
    return _truncate(escape_unprintable(" ".join(str(error).split())) or type(error).__name__, max_characters)


def _truncate(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else f"{text[:max_characters]}..."
