"""The options of a configuration model as a tree, and how the strings of a command line become values of a field."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ImportString
from pydantic.fields import FieldInfo

from configs.values import PictureSize, Strict
from configs.yaml_text import parse_yaml
from stages.system.refusal import Refused, format_value

METAVARS: dict[Any, str] = {
    int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "true|false", NoneType: "none", Any: "VALUE",
    PictureSize: "WIDTHxHEIGHT",
}  # fmt: skip
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
        if inner and inner[0].startswith("{"):
            return f"[{inner[0]}, ...]"
        return " ".join(inner if origin is tuple and Ellipsis not in arguments else [*inner, "..."])
    if origin in MAPPINGS:
        return f"NAME={metavar(arguments[1])} ..."
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return _model_metavar(annotation)
    return METAVARS.get(annotation, str(getattr(annotation, "__name__", "value")).upper())


def _model_metavar(model: type[Strict]) -> str:
    """The text that means a model, if there is one, or else its keys as YAML, those of models in it left out."""
    fields = {name: field.annotation for name, field in model.model_fields.items()}
    keys = [f"{name}: {'{...}' if [*models_of(inner)] else metavar(inner)}" for name, inner in fields.items()]
    text: str = getattr(model, "text_form", "")
    return text or f"{{{', '.join(keys)}}}"


def is_import(*parts: Any) -> bool:
    """Whether parts of a field's annotation ask for an object that is imported by its name."""
    # For a type checker ImportString is an alias of Annotated; hence Any.
    import_string: Any = ImportString
    return any(part is import_string or isinstance(part, import_string) for part in parts)


def is_list(annotation: Any) -> bool:
    """Whether a value is a list, of any length."""
    kinds = [(get_origin(member) or member, get_args(member)) for member in _union_members(annotation)]
    return any(kind in SEQUENCES and (kind is not tuple or Ellipsis in arguments) for kind, arguments in kinds)


def parse_value(tokens: Sequence[str], annotation: Any, option: str) -> Any:
    """The strings after `option` as the plain value that a YAML file would hold; pydantic validates it later."""
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
        return dict(_parse_pair(token, option) for token in tokens)
    values = [choices.get(token, token) for token in tokens]  # pydantic reads numbers from strings
    return values if len(tokens) > 1 or any(kind in SEQUENCES for kind in kinds) else values[0]


def _union_members(annotation: Any) -> list[Any]:
    """The members of a union and of the unions in it, without their annotations."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _union_members(member)]
    return [annotation]


def _literal_choices(annotation: Any) -> dict[str, Any]:
    """Each allowed literal by its spelling."""
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
    """A single value; `condition` names the union member that owns it, if any."""

    annotation: Any
    description: str
    condition: str = ""


@dataclass(frozen=True)
class OptionGroup:
    """A nested model, or a union of models with the field `discriminator`."""

    entries: "Mapping[str, Option | OptionGroup]"
    description: str
    discriminator: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """of a single model"""
    shorthand: str | None = None
    """The entry that a bare value sets: `--teacher X` means `--teacher.location X`."""

    def spelled_out(self, value: Any) -> Any:
        """A bare value as the mapping that it means; any other value as it is."""
        is_bare = self.shorthand is not None and isinstance(value, str)
        return {self.shorthand: value} if is_bare else value


@dataclass(frozen=True)
class Layer:
    """The values of one file or of the command line; later layers override earlier ones."""

    name: str
    values: Mapping[str, Any]


def option_group_of(model: type[Strict], description: str = "") -> OptionGroup:
    """The option tree of `model`."""
    return OptionGroup({name: _entry_of_field(field) for name, field in model.model_fields.items()}, description)


def models_of(annotation: Any) -> Iterator[type[Strict]]:
    """Every model in `annotation`, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from models_of(argument)


def known_keys(model: type[Strict], path: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand at `path` (steps of names and list positions), for every member of a union."""
    models = {model}
    for step in path:
        fields = [member.model_fields[step] for member in models if step in member.model_fields]
        models = {inner for field in fields for inner in models_of(field.annotation)} if fields else models
    return sorted({name for member in models for name in member.model_fields})


def defaults_of(model: type[Strict]) -> dict[str, Any]:
    """The model's default values; nested models as mappings, so that a file can change one key of them."""
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
    description = field.description or ""
    members = _member_models(field.annotation)
    if not members:
        return Option(ImportString if is_import(*field.metadata) else field.annotation, description)
    tag = next((tag for tag in (field.discriminator, *_discriminators(field.annotation)) if isinstance(tag, str)), None)
    entries: dict[str, Option | OptionGroup] = {}
    for member in members:
        for name, entry in option_group_of(member).entries.items():
            entry = entry if name == tag else _add_condition(entry, member, tag)
            entries[name] = _merge_entries(entries.get(name), entry)
    defaults = defaults_of(members[0]) if len(members) == 1 else {}
    shorthand = getattr(members[0], "shorthand", None) if len(members) == 1 else None
    return OptionGroup(entries, description or (members[0].__doc__ or ""), tag, defaults, shorthand)


def _member_models(annotation: Any) -> tuple[type[Strict], ...]:
    """The models of `Model`, `Model | None` or `Model | Other`; none when anything else is allowed."""
    members = [member for member in _union_members(annotation) if member is not NoneType]
    models = tuple(member for member in members if isinstance(member, type) and issubclass(member, Strict))
    return models if len(models) == len(members) else ()


def _discriminators(annotation: Any) -> Iterator[Any]:
    """The discriminators of the unions inside of a union."""
    for argument in get_args(annotation):
        if get_origin(argument) is Annotated:
            yield from (info.discriminator for info in get_args(argument)[1:] if isinstance(info, FieldInfo))


def _add_condition(entry: Option | OptionGroup, member: type[Strict], tag: str | None) -> Option | OptionGroup:
    """The entry, marked as belonging to the union member that `tag` chooses."""
    if tag is None:
        return entry
    if isinstance(entry, OptionGroup):
        entries = {name: _add_condition(inner, member, tag) for name, inner in entry.entries.items()}
        return replace(entry, entries=entries)
    return replace(entry, condition=f"{tag} {get_args(member.model_fields[tag].annotation)[0]}")


def _merge_entries(one: Option | OptionGroup | None, other: Option | OptionGroup) -> Option | OptionGroup:
    """The entry for a name that two members of a union share: it allows what either allows."""
    if isinstance(one, Option) and isinstance(other, Option):
        condition = " or ".join(filter(None, (one.condition, other.condition)))
        return replace(one, annotation=Union[one.annotation, other.annotation], condition=condition)  # noqa: UP007
    if isinstance(one, OptionGroup) and isinstance(other, OptionGroup):
        shared = {name: _merge_entries(one.entries.get(name), entry) for name, entry in other.entries.items()}
        return replace(one, entries={**one.entries, **shared})
    return other
