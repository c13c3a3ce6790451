"""The command line, one more layer over the YAML files: `--train.batch-size 8` says `train: {batch_size: 8}`.

tyro splits the words and prints `--help`; the values stay words here, and pydantic judges them together with the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from configs.refusal import Refused, did_you_mean
from configs.schema import Leaf, Room
from configs.words import SEQUENCES, metavar, value_of

ABSENT = ("\0absent",)
COMMON = {
    "config": Leaf(tuple[Path, ...], "YAML files laid over each other, later over earlier; options lie on top"),
    "print_config": Leaf(Literal[""], "print the resolved configuration and stop"),
}


def overrides(room: Room, words: Sequence[str], shown: Mapping[str, Any], prog: str) -> dict[str, Any]:
    """The nested mapping that `words` spell; `--help` prints every leaf with its value in `shown` and exits with 0."""
    framed = Room({**COMMON, **room.entries}, room.meaning)
    draft = _draft(framed, {"config": (), "print_config": "no", **shown})
    parsed, unknown = tyro.cli(draft, prog=prog, args=list(words), return_unknown_args=True)
    if unknown:
        raise Refused(_not_understood(unknown, room))
    return _said(room, parsed, ())


def flag(path: Sequence[str]) -> str:
    """The option that sets the leaf at `path`."""
    return "--" + ".".join(path).replace("_", "-")


def _draft(room: Room, shown: Any) -> Any:
    """A dataclass of words in the shape of `room`, for tyro to fill; `shown` holds the values that `--help` tells."""
    fields: list[tuple[str, Any, Any]] = []
    for name, entry in room.entries.items():
        now = shown.get(name, ABSENT) if isinstance(shown, Mapping) else ABSENT
        if isinstance(entry, Leaf):
            hint = tyro.conf.arg(
                metavar=metavar(entry.annotation), help=_help(entry), help_behavior_hint=_hint(now, entry)
            )
            fields.append((name, Annotated[tuple[str, ...], hint], field(default=ABSENT)))
        else:
            inner = _draft(entry, {**entry.defaults, **(now if isinstance(now, Mapping) else {})})
            fields.append((name, Annotated[inner, tyro.conf.arg(help=entry.meaning)], field(default_factory=inner)))
    return make_dataclass("Draft", fields, namespace={"__doc__": room.meaning}, frozen=True)


def _help(leaf: Leaf) -> str:
    return f"{leaf.meaning} [{leaf.condition}]" if leaf.condition else leaf.meaning


def _hint(value: Any, leaf: Leaf) -> str:
    """The default in the words that would set it."""
    if value is ABSENT:
        return "" if leaf.condition else "(required)"
    if isinstance(value, Mapping):
        value = [f"{name}={item}" for name, item in value.items()]
    words = " ".join(map(str, value)) if isinstance(value, SEQUENCES) and not isinstance(value, str) else str(value)
    return f"(default: {words or 'nothing'})"


def _said(room: Room, parsed: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """What the words set, as a nested mapping without the rest."""
    said: dict[str, Any] = {}
    for name, entry in room.entries.items():
        words, here = getattr(parsed, name), (*path, name)
        if isinstance(entry, Room):
            inner = _said(entry, words, here)
            said |= {name: inner} if inner else {}
        elif words != ABSENT:
            said[name] = value_of(words, entry.annotation, flag(here))
    return said


def _not_understood(unknown: Sequence[str], room: Room) -> str:
    """The refusal of the first word that no option took."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    if not word.startswith("-"):
        return f"{word}: not expected here - options look like --name value"
    name = word.partition("=")[0]
    return f"{name}: unknown option - {did_you_mean(name, list(_flags(room, ())))}"


def _flags(room: Room, path: tuple[str, ...]) -> Iterator[str]:
    for name, entry in room.entries.items():
        if isinstance(entry, Room):
            yield from _flags(entry, (*path, name))
        else:
            yield flag((*path, name))
