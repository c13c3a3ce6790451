"""Between the words of a command line and the values of a field: what may be written, and what the words mean.

What a configuration model may be told: its rooms (nested models) and leaves (single values), as a tree.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ImportString
from pydantic.fields import FieldInfo

from configs.values import Strict
from configs.yaml_text import parse_yaml
from stages.system.refusal import Refused, format_value

METAVARS: dict[Any, str] = {
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
    return METAVARS.get(annotation, str(getattr(annotation, "__name__", "value")).upper())


def is_import(*parts: Any) -> bool:
    """Whether a field's annotation or one of its annotations' parts asks for something imported by name."""
    # For a type checker ImportString is an alias of Annotated, so the class is named through Any.
    import_string: Any = ImportString
    return any(part is import_string or isinstance(part, import_string) for part in parts)


def parse_value(tokens: Sequence[str], annotation: Any, option: str) -> Any:
    """The words after `option` as the plain value that a YAML file would hold; pydantic judges it later."""
    kinds = [get_origin(member) or member for member in _union_members(annotation)]
    many = any(kind in SEQUENCES + MAPPINGS for kind in kinds)
    if not tokens and bool in kinds:
        return True
    if not tokens:
        raise Refused(f"{option}: needs a value ({metavar(annotation)})")
    if len(tokens) > 1 and not many:
        raise Refused(f"{option}: takes one value ({metavar(annotation)}), not {len(tokens)}: {' '.join(tokens)}")
    if len(tokens) == 1 and tokens[0].lower() in ("none", "null") and NoneType in kinds:
        return None
    if len(tokens) == 1 and tokens[0].startswith(("[", "{")) and many:
        return _parse_yaml_value(tokens[0], option)
    choices = _literal_choices(annotation)
    if any(kind in MAPPINGS for kind in kinds) and not (len(tokens) == 1 and tokens[0] in choices):
        return dict(_parse_pair(word, option) for word in tokens)
    values = [choices.get(word, word) for word in tokens]  # pydantic reads numbers from words
    return values if len(tokens) > 1 or any(kind in SEQUENCES for kind in kinds) else values[0]


def _union_members(annotation: Any) -> list[Any]:
    """The members of a union, opened at every depth, without their annotations."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _union_members(member)]
    return [annotation]


def _literal_choices(annotation: Any) -> dict[str, Any]:
    """How each literal that may stand here is spelt."""
    literals = [member for member in _union_members(annotation) if get_origin(member) is Literal]
    return {str(choice): choice for literal in literals for choice in get_args(literal)}


def _parse_pair(token: str, option: str) -> tuple[str, str]:
    name, equals, value = token.partition("=")
    if not (name and equals):
        raise Refused(f"{option}: {token} is not of the form NAME=VALUE")
    return name, value


def _parse_yaml_value(token: str, option: str) -> Any:
    try:
        return parse_yaml(token, option)
    except Refused as refusal:
        reason = str(refusal).partition("YAML: ")[2]
        raise Refused(f"{option}: {format_value(token)} is not a YAML list or mapping: {reason}") from refusal


@dataclass(frozen=True)
class Option:
    """A value that one option sets; `condition` names the union member that owns it, if any."""

    annotation: Any
    description: str
    condition: str = ""


@dataclass(frozen=True)
class OptionGroup:
    """A nested model, or a union of models told apart by the field `discriminator`."""

    entries: "Mapping[str, Option | OptionGroup]"
    description: str
    discriminator: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """what a single model takes for its entries where nobody says anything of them"""


@dataclass(frozen=True)
class Layer:
    """What one file, or the command line, says; later layers lie over earlier ones."""

    name: str
    values: Mapping[str, Any]


def option_group_of(model: type[Strict], description: str = "") -> OptionGroup:
    """The tree of `model`."""
    return OptionGroup({name: _entry_of_field(field) for name, field in model.model_fields.items()}, description)


def models_of(annotation: Any) -> Iterator[type[Strict]]:
    """Every model that `annotation` mentions, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from models_of(argument)


def known_keys(model: type[Strict], path: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand at `path` (steps of names and list positions), for every member of a union."""
    found = {model}
    for step in path:
        fields = [
            member.model_fields[step] for member in found if isinstance(step, str) and step in member.model_fields
        ]
        found = {inner for field in fields for inner in models_of(field.annotation)} if fields else found
    return sorted({name for member in found for name in member.model_fields})


def defaults_of(model: type[Strict]) -> dict[str, Any]:
    """The model's default values; nested models opened into mappings, so that a file can change one key of them."""
    fields = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    return {
        name: to_mapping(field.get_default(call_default_factory=True, validated_data={}))
        for name, field in fields.items()
    }


def to_mapping(value: Any) -> Any:
    """A model as a mapping of its values (not of their serialised form), at every depth; anything else as it is."""
    if not isinstance(value, Strict):
        return value
    return {name: to_mapping(getattr(value, name)) for name in type(value).model_fields}


def _entry_of_field(field: FieldInfo) -> Option | OptionGroup:
    meaning = field.description or ""
    members = _member_models(field.annotation)
    if not members:
        return Option(ImportString if is_import(*field.metadata) else field.annotation, meaning)
    tag = next((tag for tag in (field.discriminator, *_discriminators(field.annotation)) if isinstance(tag, str)), None)
    entries: dict[str, Option | OptionGroup] = {}
    for member in members:
        for name, entry in option_group_of(member).entries.items():
            entries[name] = _merge_entries(
                entries.get(name), _add_condition(entry, member, tag) if name != tag else entry
            )
    defaults = defaults_of(members[0]) if len(members) == 1 else {}
    return OptionGroup(entries, meaning or (members[0].__doc__ or ""), tag, defaults)


def _member_models(annotation: Any) -> tuple[type[Strict], ...]:
    """The models of `Model`, `Model | None` or `Model | Other`; none when anything else may stand there."""
    options = [option for option in _union_members(annotation) if option is not type(None)]
    models = tuple(option for option in options if isinstance(option, type) and issubclass(option, Strict))
    return models if len(models) == len(options) else ()


def _discriminators(annotation: Any) -> Iterator[Any]:
    """The discriminators of the unions inside of a union."""
    for argument in get_args(annotation):
        if get_origin(argument) is Annotated:
            yield from (said.discriminator for said in get_args(argument)[1:] if isinstance(said, FieldInfo))


def _add_condition(entry: Option | OptionGroup, member: type[Strict], tag: str | None) -> Option | OptionGroup:
    """The entry, marked as belonging to the union member that `tag` chooses."""
    if tag is None:
        return entry
    if isinstance(entry, OptionGroup):
        return replace(
            entry, entries={name: _add_condition(inner, member, tag) for name, inner in entry.entries.items()}
        )
    return replace(entry, condition=f"{tag} {get_args(member.model_fields[tag].annotation)[0]}")


def _merge_entries(one: Option | OptionGroup | None, other: Option | OptionGroup) -> Option | OptionGroup:
    """What two members of a union call by the same name: it may hold what either allows."""
    if isinstance(one, Option) and isinstance(other, Option):
        condition = " or ".join(filter(None, (one.condition, other.condition)))
        return replace(one, annotation=Union[one.annotation, other.annotation], condition=condition)  # noqa: UP007
    if isinstance(one, OptionGroup) and isinstance(other, OptionGroup):
        shared = {name: _merge_entries(one.entries.get(name), entry) for name, entry in other.entries.items()}
        return replace(one, entries={**one.entries, **shared})
    return other
