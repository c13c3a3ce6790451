"""Loads one section of YAML files, laid over each other, and the command line on top -> one frozen object."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.arguments import path_argument
from configs.options import option_name, parse_options
from configs.schema import Layer, Option, OptionGroup, defaults_of, known_keys, option_group_of
from configs.values import Strict
from configs.yaml_text import read_yaml
from stages.system.refusal import Refused, did_you_mean, format_value
from stages.system.storage.attached import attach_all
from stages.system.storage.locations import show_locations

SECTIONS = (
    "cache_teacher", "distill", "finetune_classes", "convert", "evaluate", "sample", "import", "export", "publish",
    "doctor",
)  # fmt: skip

C = TypeVar("C", bound=Strict)
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class CommonOptions:
    """The options that every command has, and the rest of its command line."""

    files: tuple[Path, ...]
    print_config: bool
    options: tuple[str, ...]


def config_from_arguments(config_type: type[C], section: str, argv: Sequence[str], prog: str | None = None) -> C | None:
    """The configuration of a command line; with `--print-config` it is printed, and None."""
    common = parse_common_options(argv)
    config = load(config_type, section, common.files, common.options, prog)
    if common.print_config:
        print(resolved_yaml(config, section), end="")
        return None
    attach_all(config.model_dump())
    return config


def name_first_argument(argv: Sequence[str], option: str, refusal: str = "") -> list[str]:
    """The command line with its first word, if that is no option, as the value of `--OPTION`.

    Raises `Refused` with the message `refusal`, if there is one, for an empty command line.
    """
    if not argv and refusal:
        raise Refused(refusal)
    return [f"--{option}", *argv] if argv and not argv[0].startswith("-") else list(argv)


def parse_common_options(argv: Sequence[str]) -> CommonOptions:
    """Split `--config FILE ...` and `--print-config` from the rest of a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", nargs="+", action="extend", default=[])
    parser.add_argument("--print-config", "--print_config", action="store_true")
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise Refused("--config: needs at least one YAML file, such as configs/tiny.yaml") from error
    return CommonOptions(tuple(path_argument(file) for file in known.config), known.print_config, tuple(rest))


def load(
    config_type: type[C],
    section: str,
    files: Sequence[Path],
    argv: Sequence[str],
    prog: str | None = None,
    overlays: Sequence[Layer] = (),
) -> C:
    """The section `section` of `files`, later over earlier, with the options of `argv` on top, validated as a whole.

    `overlays` lie between the files and the options.
    Raises `Refused`, one line for each error: its source, the key's full path, the value, what would be valid.
    """
    options = option_group_of(config_type, config_type.__doc__ or "")
    layers = [Layer("default", defaults_of(config_type))]
    layers += [Layer(str(file), _read_section(file, section)) for file in files]
    layers += overlays
    prog = prog or f"sollune {section.replace('_', '-')}"
    layers.append(Layer("command line", parse_options(options, argv, _merge_layers(layers, options), prog)))
    values = _merge_layers(layers, options)
    try:
        config = config_type.model_validate(values)
    except ValidationError as error:
        raise Refused(_validation_message(error, config_type, section, values, layers)) from error
    # A file may hold the settings of several uses; an option is meant for this one.
    for key, way_out in config.unused_keys().items():
        if key in layers[-1].values:
            raise Refused(f"{_first_option(layers[-1].values, key)}: has no effect here - {way_out}")
    return config


def resolved_yaml(config: Strict, section: str, without: Collection[str] = ()) -> str:
    """The whole configuration, but for keys that it is `without`, as YAML that `--config` reads back."""
    content = {section: config.model_dump(mode="json", exclude=set(without))}
    return yaml.safe_dump(show_locations(content), sort_keys=False, allow_unicode=True, width=120)


def first_error(error: ValidationError, model: type[Strict], content: Any) -> tuple[KeyPath, str]:
    """The key path of the first error in a file's content, and the value with what would be valid."""
    first = error.errors(include_url=False)[0]
    path, value = _key_path(first, content), first["input"]
    if first["type"] == "missing":
        return path, "required - write it there"
    if first["type"] == "union_tag_invalid":
        value = first["ctx"]["tag"]
    problem = _problem(first, path, model)
    return path, problem if not path or isinstance(value, Mapping | Strict) else f"{format_value(value)}: {problem}"


def _first_option(values: Mapping[str, Any], key: str) -> str:
    """The first option of a command line that sets something of a key."""
    path, value = [key], values[key]
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        path.append(name)
    return option_name(path)


def _read_section(file: Path, section: str) -> dict[str, Any]:
    """The values of one section of `file`; empty when the file does not have it."""
    content = read_yaml(file, str(file), "--config takes YAML files")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise Refused(f"{file}: should be a mapping of sections ({', '.join(SECTIONS)})")
    for name, values in content.items():
        if name not in SECTIONS:
            raise Refused(f"{file}: {format_value(name)}: unknown section - {did_you_mean(str(name), SECTIONS)}")
        if not isinstance(values, dict | None):
            raise Refused(f"{file}: {name} = {format_value(values)}: should be a mapping of keys to values")
    return content.get(section) or {}


def _merge_layers(layers: Sequence[Layer], options: OptionGroup) -> dict[str, Any]:
    return reduce(lambda values, layer: _merge(values, layer.values, options), layers, dict[str, Any]())


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any], options: Option | OptionGroup | None) -> dict[str, Any]:
    """`upper` over `lower`: mappings merge key by key, anything else is replaced.

    A mapping that chooses another member of a union replaces the earlier one, whose keys mean nothing there.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        inner = options.entries.get(key) if isinstance(options, OptionGroup) else None
        value = inner.spelled_out(value) if isinstance(inner, OptionGroup) else value
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            tag = inner.discriminator if isinstance(inner, OptionGroup) else None
            if tag is None or tag not in value or value[tag] == below.get(tag):
                value = _merge(below, value, inner)
        merged[key] = value
    return merged


def _validation_message(
    error: ValidationError, config_type: type[Strict], section: str, values: Mapping[str, Any], layers: Sequence[Layer]
) -> str:
    """One line for each error in `values`, the merged `layers`."""
    problems: dict[str, str] = {}
    for details in error.errors(include_url=False):
        path, value = _key_path(details, values), details["input"]
        if details["type"].startswith("union_tag"):
            path, value = (*path, details["ctx"]["discriminator"].strip("'")), details["ctx"].get("tag")
        prefix, problem = (
            _error_prefix(details["type"], path, value, section, layers),
            _problem(details, path, config_type),
        )
        # The members of an untagged union report errors one by one about the same value: they make one line.
        problems[prefix] = f"{problems[prefix]}, or {problem}" if prefix in problems else problem
    return "\n".join(f"{prefix}: {problem}" for prefix, problem in problems.items())


def _key_path(error: ErrorDetails, values: Any) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of the file."""
    path: list[str | int] = []
    for step in error["loc"]:
        exists, inner = _descend(values, step)
        if exists or (error["type"] == "missing" and step == error["loc"][-1]):
            path.append(step)
            values = inner
    return tuple(path)


def _descend(values: Any, step: str | int) -> tuple[bool, Any]:
    """Whether `values` has something at `step`, and what; else `values` itself."""
    is_index = isinstance(values, list | tuple) and isinstance(step, int) and step < len(values)
    exists = is_index or (isinstance(values, Mapping) and step in values)
    return exists, values[step] if exists else values


def _error_prefix(error_type: str, path: KeyPath, value: Any, section: str, layers: Sequence[Layer]) -> str:
    """The source of a value, its key's full path, and the value if there is one that is short enough to show."""
    key, is_group = ".".join(map(str, (section, *path))), isinstance(value, Mapping | Strict)
    if error_type in ("missing", "union_tag_not_found") or (error_type == "value_error" and is_group):
        return key
    source = next((f"{layer.name}: " for layer in reversed(layers) if _has_key(layer.values, path)), "")
    return f"{source}{key}" if is_group else f"{source}{key} = {format_value(value)}"


def _has_key(values: Any, path: KeyPath) -> bool:
    for step in path:
        exists, values = _descend(values, step)
        if not exists:
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
        if len(names) < len(path):  # of an entry of a list, which has no option of its own
            return f"required - write {path[-1]} into that entry"
        return f"required - write it in a YAML file or give {option_name(names)}"
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        return "should be a mapping of keys to values"
    if kind in ("tuple_type", "list_type"):
        return "should be a list"
    message = " ".join(error["msg"].removeprefix("Value error, ").split())
    return message.replace("Input should", "should", 1)
