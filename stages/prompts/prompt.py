"""What a prompt is, and which split owns it.

Modules of the optional extras.
"""

import hashlib
import importlib
from dataclasses import dataclass
from typing import Any, Literal

from stages.system.refusal import Refused

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


def import_extra(module: str, what: str) -> Any:
    """A module of the optional extra; raises `Refused` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(
            f"prompts: {what} needs the package {module.partition('.')[0]} - pip install 'sollune[datasets]'"
        ) from error
