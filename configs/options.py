"""The command line as one more layer over the YAML files: `--train.batch-size 8` means `train: {batch_size: 8}`.

tyro splits the command line and prints `--help`; the values stay strings, which pydantic validates with the files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from configs.schema import SEQUENCES, Option, OptionGroup, is_list, metavar, parse_value
from stages.system.refusal import Refused, did_you_mean

UNSET = ("\0absent",)
COMMON_OPTIONS = {
    "config": Option(tuple[Path, ...], "YAML files, later ones override earlier ones; options override both"),
    "print_config": Option(Literal[""], "print the resolved configuration and stop"),
}


def parse_options(
    options: OptionGroup, argv: Sequence[str], current_values: Mapping[str, Any], prog: str
) -> dict[str, Any]:
    """The options of a command line as a nested mapping; `--help` prints each with its current value and exits."""
    all_options = OptionGroup({**COMMON_OPTIONS, **options.entries}, options.description)
    arguments_class = _arguments_class((), all_options, {"config": (), "print_config": "no", **current_values})
    arguments = _join_repeated(argv, options)
    parsed, unknown = tyro.cli(arguments_class, prog=prog, args=arguments, return_unknown_args=True)
    if unknown:
        raise Refused(_unknown_option_message(unknown, options))
    return _set_values(options, parsed, ())


def option_name(path: Sequence[str]) -> str:
    """The option that sets the key at `path`."""
    return "--" + ".".join(path).replace("_", "-")


def _join_repeated(argv: Sequence[str], options: OptionGroup) -> list[str]:
    """The command line with the values of a list that is given several times behind its first mention.

    tyro takes the last mention alone, and the values of the others would be lost without a word.
    """
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    names = [group[0].partition("=")[0].replace("_", "-") for group in groups]
    repeated = {name for name, times in Counter(names).items() if times > 1}.intersection(_list_options(options))
    first: dict[str, list[str]] = {}
    for name, group in zip(names, groups, strict=True):
        if name in repeated:
            _, equals, value = group[0].partition("=")
            values = [*([value] if equals else []), *group[1:]]
            group[:] = [] if name in first else [name]
            first.setdefault(name, group).extend(values)
    return [word for group in groups for word in group]


def _list_options(options: OptionGroup, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, entry in options.entries.items():
        if isinstance(entry, OptionGroup):
            yield from _list_options(entry, (*path, name))
        elif is_list(entry.annotation):
            yield option_name((*path, name))


def _arguments_class(path: tuple[str, ...], options: OptionGroup, current_values: Any) -> Any:
    """A dataclass of strings with the structure of `options`, for tyro to fill; `--help` shows `current_values`.

    `path` is where the group is; its shorthand is set by the name of the group too.
    """
    fields: list[tuple[str, Any, Any]] = []
    for name, entry in options.entries.items():
        current = current_values.get(name, UNSET) if isinstance(current_values, Mapping) else UNSET
        if isinstance(entry, Option):
            text = f"{entry.description} [{entry.condition}]" if entry.condition else entry.description
            default = _default_text(current, entry)
            aliases = (option_name(path),) if path and name == options.shorthand else None
            hint = tyro.conf.arg(
                metavar=metavar(entry.annotation), help=text, help_behavior_hint=default, aliases=aliases
            )
            fields.append((name, Annotated[tuple[str, ...], hint], field(default=UNSET)))
        else:
            inner = _arguments_class(
                (*path, name), entry, {**entry.defaults, **(current if isinstance(current, Mapping) else {})}
            )
            fields.append((name, Annotated[inner, tyro.conf.arg(help=entry.description)], field(default_factory=inner)))
    return make_dataclass("Arguments", fields, namespace={"__doc__": options.description}, frozen=True)


def _default_text(value: Any, option: Option) -> str:
    """The default as it would be written on the command line."""
    if value is UNSET:
        return "" if option.condition else "(required)"
    if isinstance(value, Mapping):
        value = [f"{name}={item}" for name, item in value.items()]
    text = " ".join(map(str, value)) if isinstance(value, SEQUENCES) and not isinstance(value, str) else str(value)
    return f"(default: {text or 'nothing'})"


def _set_values(options: OptionGroup, parsed: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """The options that were set, as a nested mapping."""
    values: dict[str, Any] = {}
    for name, entry in options.entries.items():
        argument, inner_path = getattr(parsed, name), (*path, name)
        if isinstance(entry, OptionGroup):
            inner = _set_values(entry, argument, inner_path)
            values |= {name: inner} if inner else {}
        elif argument != UNSET:
            named = path if path and name == options.shorthand else inner_path
            values[name] = parse_value(argument, entry.annotation, option_name(named))
    return values


def _unknown_option_message(unknown: Sequence[str], options: OptionGroup) -> str:
    """The message about the first word that belongs to no option."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    if not word.startswith("-"):
        return f"{word}: not expected here - options look like --name value"
    name = word.partition("=")[0]
    return f"{name}: unknown option - {did_you_mean(name, list(_option_names(options)))}"


def _option_names(options: OptionGroup, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, entry in options.entries.items():
        if isinstance(entry, OptionGroup):
            if entry.shorthand:
                yield option_name((*path, name))
            yield from _option_names(entry, (*path, name))
        else:
            yield option_name((*path, name))
