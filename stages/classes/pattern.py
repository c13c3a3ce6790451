"""How much a glob over class names says, so that of two that fit, the one that says more can win."""

import re
from collections.abc import Iterator
from typing import NamedTuple

TOKEN = re.compile(r"\[!?\]?[^]]*\]|.", re.DOTALL)
"""`*`, `?`, a set such as `[a-c]`, or one letter, as `fnmatch` reads them (its `*` passes over `/` too)."""
ESCAPED = re.compile(r"\[[^!]\]")
"""A set of one letter: the letter itself."""


class Specificity(NamedTuple):
    """How much is said, compared from the first field on: a greater one is more specific, equal ones are a tie.

    `star/red` > `star/*` > `*/*` > `*`, and `animal/*fox` > `animal/*`; but `star/*` ties with `*/red`: how long a
    word is spelt decides nothing as long as it stands alone between the slashes.
    """

    fixed: int = 0
    """parts (between slashes) without a wildcard, and tags whose word is told"""
    parts: int = 0
    """parts and tags in all: how deep it reaches"""
    letters: int = 0
    """letters told within the parts that have a wildcard"""
    sets: int = 0
    places: int = 0
    """question marks"""
    minus_stars: int = 0

    def joined(self, other: "Specificity") -> "Specificity":
        """What both say together."""
        return Specificity(*(a + b for a, b in zip(self, other, strict=True)))


def specificity(pattern: str) -> Specificity:
    """How much a pattern says."""
    said = Specificity()
    for part in _parts(pattern):
        said = said.joined(_of_part(part))
    return said


def _of_part(tokens: list[str]) -> Specificity:
    stars, places = tokens.count("*"), tokens.count("?")
    sets = sum(len(token) > 1 for token in tokens)
    if not stars + places + sets:
        return Specificity(fixed=1, parts=1)
    return Specificity(0, 1, len(tokens) - stars - places - sets, sets, places, -stars)


def _parts(pattern: str) -> Iterator[list[str]]:
    """The tokens of each part; a letter that is escaped as a set counts as that letter, even where it is a star."""
    part: list[str] = []
    for token in TOKEN.findall(pattern):
        if token == "/":
            yield part
            part = []
        else:
            part.append("a" if ESCAPED.fullmatch(token) else token)
    yield part
