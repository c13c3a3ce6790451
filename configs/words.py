"""Between the words of a command line and the values of a field: what may be written, and what the words mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ImportString

from configs.characters import printable
from configs.refusal import Refused
from configs.yaml_text import parse_yaml

NAMES: dict[Any, str] = {
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    Path: "PATH",
    bool: "true|false",
    NoneType: "none",
    Any: "VALUE",
}
SEQUENCES: tuple[Any, ...] = (tuple, list, set, frozenset, Sequence)
MAPPINGS: tuple[Any, ...] = (dict, Mapping)


def metavar(annotation: Any) -> str:
    """What a user may write for `annotation`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_import(annotation, *arguments):
        return "MODULE.NAME"
    if origin is Annotated:
        return metavar(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(metavar(argument) for argument in arguments))
    if origin in SEQUENCES:
        inner = [metavar(argument) for argument in arguments if argument is not Ellipsis]
        return " ".join(inner if origin is tuple and Ellipsis not in arguments else [*inner, "..."])
    if origin in MAPPINGS:
        return f"NAME={metavar(arguments[1])} ..."
    return NAMES.get(annotation, str(getattr(annotation, "__name__", "value")).upper())


def is_import(*parts: Any) -> bool:
    """Whether a field's annotation or one of its annotations' parts asks for something imported by name."""
    # For a type checker ImportString is an alias of Annotated, so the class is named through Any.
    import_string: Any = ImportString
    return any(part is import_string or isinstance(part, import_string) for part in parts)


def value_of(words: Sequence[str], annotation: Any, option: str) -> Any:
    """The words after `option` as the plain value that a YAML file would hold; pydantic judges it later."""
    kinds = [get_origin(member) or member for member in _alternatives(annotation)]
    many = any(kind in SEQUENCES + MAPPINGS for kind in kinds)
    if not words and bool in kinds:
        return True
    if not words:
        raise Refused(f"{option}: needs a value ({metavar(annotation)})")
    if len(words) > 1 and not many:
        raise Refused(f"{option}: takes one value ({metavar(annotation)}), not {len(words)}: {' '.join(words)}")
    if len(words) == 1 and words[0].lower() in ("none", "null") and NoneType in kinds:
        return None
    if len(words) == 1 and words[0].startswith(("[", "{")) and many:
        return _yaml(words[0], option)
    choices = _choices(annotation)
    if any(kind in MAPPINGS for kind in kinds) and not (len(words) == 1 and words[0] in choices):
        return dict(_pair(word, option) for word in words)
    values = [choices.get(word, word) for word in words]  # pydantic reads numbers from words
    return values if len(words) > 1 or any(kind in SEQUENCES for kind in kinds) else values[0]


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, opened at every depth, without their annotations."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def _choices(annotation: Any) -> dict[str, Any]:
    """How each literal that may stand here is spelt."""
    literals = [member for member in _alternatives(annotation) if get_origin(member) is Literal]
    return {str(choice): choice for literal in literals for choice in get_args(literal)}


def _pair(word: str, option: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals):
        raise Refused(f"{option}: {word} is not of the form NAME=VALUE")
    return name, value


def _yaml(word: str, option: str) -> Any:
    try:
        return parse_yaml(word, option)
    except Refused as refusal:
        reason = str(refusal).partition("YAML: ")[2]
        raise Refused(f"{option}: {printable(word)} is not a YAML list or mapping: {reason}") from refusal
