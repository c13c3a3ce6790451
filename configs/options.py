"""The command line, one more layer over the YAML files: `--train.batch-size 8` says `train: {batch_size: 8}`.

tyro splits the words and prints `--help`; the values stay words here, and pydantic judges them together with the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from configs.schema import SEQUENCES, Option, OptionGroup, metavar, parse_value
from stages.system.refusal import Refused, did_you_mean

UNSET = ("\0absent",)
COMMON_OPTIONS = {
    "config": Option(tuple[Path, ...], "YAML files laid over each other, later over earlier; options lie on top"),
    "print_config": Option(Literal[""], "print the resolved configuration and stop"),
}


def parse_options(
    options: OptionGroup, argv: Sequence[str], current_values: Mapping[str, Any], prog: str
) -> dict[str, Any]:
    """The nested mapping that `words` spell; `--help` prints every leaf with its value in `shown` and exits with 0."""
    framed = OptionGroup({**COMMON_OPTIONS, **options.entries}, options.description)
    draft = _arguments_class(framed, {"config": (), "print_config": "no", **current_values})
    parsed, unknown = tyro.cli(draft, prog=prog, args=list(argv), return_unknown_args=True)
    if unknown:
        raise Refused(_unknown_option_message(unknown, options))
    return _set_values(options, parsed, ())


def option_name(path: Sequence[str]) -> str:
    """The option that sets the leaf at `path`."""
    return "--" + ".".join(path).replace("_", "-")


def _arguments_class(options: OptionGroup, current_values: Any) -> Any:
    """A dataclass of words in the shape of `room`, for tyro to fill; `shown` holds the values that `--help` tells."""
    fields: list[tuple[str, Any, Any]] = []
    for name, entry in options.entries.items():
        now = current_values.get(name, UNSET) if isinstance(current_values, Mapping) else UNSET
        if isinstance(entry, Option):
            hint = tyro.conf.arg(
                metavar=metavar(entry.annotation), help=_help_text(entry), help_behavior_hint=_default_text(now, entry)
            )
            fields.append((name, Annotated[tuple[str, ...], hint], field(default=UNSET)))
        else:
            inner = _arguments_class(entry, {**entry.defaults, **(now if isinstance(now, Mapping) else {})})
            fields.append((name, Annotated[inner, tyro.conf.arg(help=entry.description)], field(default_factory=inner)))
    return make_dataclass("Draft", fields, namespace={"__doc__": options.description}, frozen=True)


def _help_text(option: Option) -> str:
    return f"{option.description} [{option.condition}]" if option.condition else option.description


def _default_text(value: Any, option: Option) -> str:
    """The default in the words that would set it."""
    if value is UNSET:
        return "" if option.condition else "(required)"
    if isinstance(value, Mapping):
        value = [f"{name}={item}" for name, item in value.items()]
    words = " ".join(map(str, value)) if isinstance(value, SEQUENCES) and not isinstance(value, str) else str(value)
    return f"(default: {words or 'nothing'})"


def _set_values(options: OptionGroup, parsed: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """What the words set, as a nested mapping without the rest."""
    said: dict[str, Any] = {}
    for name, entry in options.entries.items():
        words, here = getattr(parsed, name), (*path, name)
        if isinstance(entry, OptionGroup):
            inner = _set_values(entry, words, here)
            said |= {name: inner} if inner else {}
        elif words != UNSET:
            said[name] = parse_value(words, entry.annotation, option_name(here))
    return said


def _unknown_option_message(unknown: Sequence[str], options: OptionGroup) -> str:
    """The refusal of the first word that no option took."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    if not word.startswith("-"):
        return f"{word}: not expected here - options look like --name value"
    name = word.partition("=")[0]
    return f"{name}: unknown option - {did_you_mean(name, list(_option_names(options, ())))}"


def _option_names(options: OptionGroup, path: tuple[str, ...]) -> Iterator[str]:
    for name, entry in options.entries.items():
        if isinstance(entry, OptionGroup):
            yield from _option_names(entry, (*path, name))
        else:
            yield option_name((*path, name))
