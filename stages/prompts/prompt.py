"""What a prompt is, and which split owns it."""

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation"]
VALIDATION_ONE_IN = 16


@dataclass(frozen=True)
class Prompt:
    """A sentence, the class it belongs to (`family/member`, for quotas and globs) and the seed of its picture."""

    text: str
    class_name: str
    seed: int
    derivation: tuple[tuple[str, str], ...] = ()
    """How the sentence came about: (choice, what was chosen), in the order of choosing."""


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on the process, platform or order of calls)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def split_of(text: str) -> Split:
    """The split that owns a sentence: decided by the sentence itself, so no source can leak one into the other."""
    return "validation" if derived_seed("split", text) % VALIDATION_ONE_IN == 0 else "train"
