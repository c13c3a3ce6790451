"""The one way to say no to a user."""

import difflib
from collections.abc import Sequence


class Refused(Exception):
    """Bad input, told in one line that names the thing, its value and the way out; the door exits with 2."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The known name nearest to a mistyped one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
