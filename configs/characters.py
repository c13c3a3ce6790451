"""Characters that belong in no sentence, and how a value is shown on one line."""

import re

LONGEST_SHOWN = 60
FAULTS = {
    "not UTF-8": "\udc80-\udcff",  # where Python keeps bytes that it cannot decode
    "with lone surrogates": "\ud800-\udc7f\udd00-\udfff",
    "with control characters": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    "with bidirectional controls": "\u202a-\u202e\u2066-\u2069",
    "with a byte-order mark inside": "\ufeff",
    "with noncharacters": "\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)),
}
"""Reason -> the characters that make a sentence unusable; tab, line feed and carriage return are allowed."""
FAULTY = re.compile(f"[{''.join(FAULTS.values())}]")


def fault_of(text: str) -> str | None:
    """Why a text cannot be used, by the first character that does not belong in it; none for a good text."""
    match = FAULTY.search(text)
    if match is None:
        return None
    return next(reason for reason, characters in FAULTS.items() if re.match(f"[{characters}]", match.group()))


def faulty_character(text: str) -> str:
    """The first character that does not belong in a text: U+0007, or byte FF of what is not UTF-8; else nothing."""
    match = FAULTY.search(text)
    if match is None:
        return ""
    code = ord(match.group())
    return f"byte {code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"


def printable(value: object) -> str:
    """A value for a message: on one line, without characters that a terminal obeys, and not too long."""
    words = value if isinstance(value, str) else repr(value)
    if not words.isprintable() or words == "" or words != words.strip():
        words = repr(words)
    return words if len(words) <= LONGEST_SHOWN else f"{words[:LONGEST_SHOWN]}..."


def escaped(text: str) -> str:
    """A text of any length without characters that a terminal obeys: each is shown as its escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
