"""What decides the bytes of a cache, and how two such decisions differ."""

import hashlib
import json
from collections.abc import Iterator

from pydantic import Field, JsonValue

from configs.strict import Stored
from shards.record import SCHEMA

LONGEST_VALUE = 40


class Recipe(Stored):
    """What made a cache: `identity` decides its bytes, `information` (versions, where things lay) does not."""

    schema_version: int = SCHEMA
    identity: dict[str, JsonValue]
    information: dict[str, JsonValue] = Field(default_factory=dict)

    def fingerprint(self) -> str:
        """sha256 over everything that decides the bytes, in hex."""
        counts: JsonValue = {"schema_version": self.schema_version, "identity": self.identity}
        return hashlib.sha256(_canonical(counts).encode()).hexdigest()

    def leaves(self) -> dict[str, str]:
        """Dotted name -> value, for each single thing that counts."""
        return {"schema_version": str(self.schema_version), **dict(_leaves("", self.identity))}


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Each dotted field that counts and is not the same in both, with its value in `a` (was) and in `b` (is now)."""
    before, now = a.leaves(), b.leaves()
    return [
        f"{name} was {_short(before.get(name))}, is now {_short(now.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _leaves(name: str, value: JsonValue) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, inner)
    else:
        yield name, _canonical(value)


def _canonical(value: JsonValue) -> str:
    """One text for one value: 5 and 5.0, or true and 1, are different things to whoever reads them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _short(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= LONGEST_VALUE else f"{value[:16]}..."
