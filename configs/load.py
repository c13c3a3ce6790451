"""A configuration file: a YAML mapping with one top-level section for each command.

What pydantic found wrong with a configuration, in lines that name the key's full path, the value and the way out.

The one door to a configuration: YAML files laid over each other, then the command line -> one frozen object.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.options import option_name, parse_options
from configs.schema import Layer, Option, OptionGroup, defaults_of, known_keys, option_group_of
from configs.values import Strict, path_argument
from configs.yaml_text import read_yaml
from stages.system.atomic import atomic_write
from stages.system.refusal import Refused, did_you_mean, format_value

SECTIONS = (
    "cache_teacher", "distill", "finetune_classes", "evaluate", "sample", "import", "export", "publish",
)  # fmt: skip


def read_section(file: Path, section: str) -> dict[str, Any]:
    """The values of one section of `file`; nothing when the file does not speak of it."""
    content = _read_sections(file)
    for name, values in content.items():
        if name not in SECTIONS:
            raise Refused(f"{file}: {format_value(name)}: unknown section - {did_you_mean(str(name), SECTIONS)}")
        if not isinstance(values, dict | None):
            raise Refused(f"{file}: {name} = {format_value(values)}: should be a mapping of keys to values")
    return content.get(section) or {}


def _read_sections(file: Path) -> dict[Any, Any]:
    content = read_yaml(file, str(file), "--config takes YAML files")
    if not isinstance(content, dict | None):
        raise Refused(f"{file}: should be a mapping of sections ({', '.join(SECTIONS)})")
    return content or {}


KeyPath = tuple[str | int, ...]


def validation_message(
    error: ValidationError, config_type: type[Strict], section: str, values: Mapping[str, Any], layers: Sequence[Layer]
) -> str:
    """One line for each slip in `values`, which `layers` made up."""
    lines: dict[str, str] = {}
    for slip in error.errors(include_url=False):
        path, value = _key_path(slip, values), slip["input"]
        if slip["type"].startswith("union_tag"):
            path, value = (*path, slip["ctx"]["discriminator"].strip("'")), slip["ctx"].get("tag")
        head = _error_prefix(slip["type"], path, value, section, layers)
        said = _problem(slip, path, config_type)
        # The members of an untagged union complain one by one about the same value: their wishes make one line.
        lines[head] = f"{lines[head]}, or {said}" if head in lines else said
    return "\n".join(f"{head}: {said}" for head, said in lines.items())


def first_error(error: ValidationError, model: type[Strict], content: Any) -> tuple[KeyPath, str]:
    """Where the first slip of a file's content lies, and its value with what would be right."""
    slip = error.errors(include_url=False)[0]
    place, value = _key_path(slip, content), slip["input"]
    if slip["type"] == "missing":
        return place, "required - write it there"
    wanted = _problem(slip, place, model)
    if not place or isinstance(value, Mapping | Strict):
        return place, wanted
    return place, f"{format_value(value)}: {wanted}"


def _key_path(error: ErrorDetails, values: Any) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of the file."""
    place: list[str | int] = []
    for step in error["loc"]:
        found, inner = _descend(values, step)
        if found or (error["type"] == "missing" and step == error["loc"][-1]):
            place.append(step)
            values = inner
    return tuple(place)


def _descend(values: Any, step: str | int) -> tuple[bool, Any]:
    """Whether `values` has something at `step`, and what."""
    if isinstance(values, Mapping) and step in values:
        return True, values[step]
    if isinstance(values, list | tuple) and isinstance(step, int) and step < len(values):
        return True, values[step]
    return False, values


def _error_prefix(error_type: str, path: KeyPath, value: Any, section: str, layers: Sequence[Layer]) -> str:
    """Where it was said, the key's full path, and the value when there is one and it is short enough to show."""
    key = ".".join(map(str, (section, *path)))
    if error_type in ("missing", "union_tag_not_found") or (
        error_type == "value_error" and isinstance(value, Mapping | Strict)
    ):
        return key
    source = next((f"{layer.name}: " for layer in reversed(layers) if _has_key(layer.values, path)), "")
    if isinstance(value, Mapping | Strict):
        return f"{source}{key}"
    return f"{source}{key} = {format_value(value)}"


def _has_key(values: Any, path: KeyPath) -> bool:
    for step in path:
        found, values = _descend(values, step)
        if not found:
            return False
    return True


def _problem(error: ErrorDetails, path: KeyPath, config_type: type[Strict]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"unknown key - {did_you_mean(str(path[-1]), known_keys(config_type, path[:-1]))}"
    if kind == "union_tag_invalid":
        return f"should be one of {error['ctx']['expected_tags']}"
    if kind in ("missing", "union_tag_not_found"):
        names = [step for step in path if isinstance(step, str)]
        option = f" or give {option_name(names)}" if len(names) == len(path) else ""
        return f"required - write it in a YAML file{option}"
    said = " ".join(error["msg"].removeprefix("Value error, ").split())
    return said.replace("Input should", "should", 1)


C = TypeVar("C", bound=Strict)


@dataclass(frozen=True)
class CommonOptions:
    """What a command's words ask for before its own options are read."""

    files: tuple[Path, ...]
    print_config: bool
    options: tuple[str, ...]


def parse_common_options(argv: Sequence[str]) -> CommonOptions:
    """Take `--config FILE ...` and `--print-config` out of the words of a command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="+", action="extend", type=Path, default=[])
    parser.add_argument("--print-config", "--print_config", action="store_true")
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise Refused("--config: needs at least one YAML file, such as configs/tiny.yaml") from error
    return CommonOptions(tuple(path_argument(str(file)) for file in known.config), known.print_config, tuple(rest))


def load(config_type: type[C], section: str, files: Sequence[Path], argv: Sequence[str], prog: str | None = None) -> C:
    """The section `section` of `files`, later over earlier, with the options of `argv` on top, judged as a whole.

    Raises `Refused`, one line for each slip: where it was said, the key's full path, the value, what would be right.
    """
    room = option_group_of(config_type, config_type.__doc__ or "")
    layers = [Layer("default", defaults_of(config_type))]
    layers += [Layer(str(file), read_section(file, section)) for file in files]
    below = _merge_layers(layers, room)
    prog = prog or f"sollune {section.replace('_', '-')}"
    layers.append(Layer("command line", parse_options(room, argv, below, prog)))
    values = _merge_layers(layers, room)
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise Refused(validation_message(error, config_type, section, values, layers)) from error


def resolved_yaml(config: Strict, section: str) -> str:
    """The whole configuration as YAML that `--config` reads back."""
    return yaml.safe_dump({section: config.model_dump(mode="json")}, sort_keys=False, allow_unicode=True, width=120)


def config_from_arguments(config_type: type[C], section: str, argv: Sequence[str], prog: str | None = None) -> C | None:
    """The configuration that a command's words ask for; None when they ask to see it, and it is printed."""
    asked = parse_common_options(argv)
    config = load(config_type, section, asked.files, asked.options, prog)
    if asked.print_config:
        print(resolved_yaml(config, section), end="")
        return None
    return config


def save_resolved(config: Strict, path: Path, section: str) -> None:
    """Write the whole configuration to `path`, all or nothing."""
    atomic_write(path, resolved_yaml(config, section))


def _merge_layers(layers: Sequence[Layer], options: OptionGroup) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merge(values, layer.values, options)
    return values


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any], options: Option | OptionGroup | None) -> dict[str, Any]:
    """`upper` over `lower`: mappings merge key by key, anything else is replaced.

    A mapping that chooses another member of a union replaces the earlier one, whose keys mean nothing there.
    """
    laid = dict(lower)
    for key, value in upper.items():
        below = laid.get(key)
        inner = options.entries.get(key) if isinstance(options, OptionGroup) else None
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _is_same_member(below, value, inner):
            value = _merge(below, value, inner)
        laid[key] = value
    return laid


def _is_same_member(lower: Mapping[str, Any], upper: Mapping[str, Any], options: Option | OptionGroup | None) -> bool:
    tag = options.discriminator if isinstance(options, OptionGroup) else None
    return tag is None or tag not in upper or upper[tag] == lower.get(tag)
