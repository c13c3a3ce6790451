"""The one door to a configuration: YAML files laid over each other, then the command line -> one frozen object."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from configs.atomic import atomic_write
from configs.judgement import judgement
from configs.options import overrides
from configs.refusal import Refused
from configs.schema import Layer, Leaf, Room, defaults_of, room_of
from configs.sections import read_section
from configs.strict import Strict
from configs.values import place

C = TypeVar("C", bound=Strict)


@dataclass(frozen=True)
class Request:
    """What a command's words ask for before its own options are read."""

    files: tuple[Path, ...]
    print_config: bool
    options: tuple[str, ...]


def request(argv: Sequence[str]) -> Request:
    """Take `--config FILE ...` and `--print-config` out of the words of a command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="+", action="extend", type=Path, default=[])
    parser.add_argument("--print-config", "--print_config", action="store_true")
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise Refused("--config: needs at least one YAML file, such as configs/tiny.yaml") from error
    return Request(tuple(place(str(file)) for file in known.config), known.print_config, tuple(rest))


def load(config_type: type[C], section: str, files: Sequence[Path], argv: Sequence[str], prog: str | None = None) -> C:
    """The section `section` of `files`, later over earlier, with the options of `argv` on top, judged as a whole.

    Raises `Refused`, one line for each slip: where it was said, the key's full path, the value, what would be right.
    """
    room = room_of(config_type, config_type.__doc__ or "")
    layers = [Layer("default", defaults_of(config_type))]
    layers += [Layer(str(file), read_section(file, section)) for file in files]
    below = _laid(layers, room)
    prog = prog or f"sollune {section.replace('_', '-')}"
    layers.append(Layer("command line", overrides(room, argv, below, prog)))
    values = _laid(layers, room)
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise Refused(judgement(error, config_type, section, values, layers)) from error


def resolved_yaml(config: Strict, section: str) -> str:
    """The whole configuration as YAML that `--config` reads back."""
    return yaml.safe_dump({section: config.model_dump(mode="json")}, sort_keys=False, allow_unicode=True, width=120)


def asked_for(config_type: type[C], section: str, words: Sequence[str], prog: str | None = None) -> C | None:
    """The configuration that a command's words ask for; None when they ask to see it, and it is printed."""
    asked = request(words)
    config = load(config_type, section, asked.files, asked.options, prog)
    if asked.print_config:
        print(resolved_yaml(config, section), end="")
        return None
    return config


def save_resolved(config: Strict, path: Path, section: str) -> None:
    """Write the whole configuration to `path`, all or nothing."""
    atomic_write(path, resolved_yaml(config, section))


def _laid(layers: Sequence[Layer], room: Room) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for layer in layers:
        values = _over(values, layer.values, room)
    return values


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any], room: Leaf | Room | None) -> dict[str, Any]:
    """`upper` over `lower`: mappings merge key by key, anything else is replaced.

    A mapping that chooses another member of a union replaces the earlier one, whose keys mean nothing there.
    """
    laid = dict(lower)
    for key, value in upper.items():
        below = laid.get(key)
        inner = room.entries.get(key) if isinstance(room, Room) else None
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _same_member(below, value, inner):
            value = _over(below, value, inner)
        laid[key] = value
    return laid


def _same_member(below: Mapping[str, Any], value: Mapping[str, Any], room: Leaf | Room | None) -> bool:
    tag = room.discriminator if isinstance(room, Room) else None
    return tag is None or tag not in value or value[tag] == below.get(tag)
