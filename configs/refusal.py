"""The one way to say no to a user."""

import difflib
from collections.abc import Sequence

from configs.characters import escaped


class Refused(Exception):
    """Bad input, told in one line that names the thing, its value and the way out; the door exits with 2."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The known name nearest to a mistyped one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, on one line of at most so many letters; its kind where it says nothing."""
    words = escaped(" ".join(str(error).split())) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]}..."
