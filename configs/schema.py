"""What a configuration model may be told: its rooms (nested models) and leaves (single values), as a tree."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ImportString
from pydantic.fields import FieldInfo

from configs.strict import Strict
from configs.words import is_import


@dataclass(frozen=True)
class Leaf:
    """A value that one option sets; `condition` names the union member that owns it, if any."""

    annotation: Any
    meaning: str
    condition: str = ""


@dataclass(frozen=True)
class Room:
    """A nested model, or a union of models told apart by the field `discriminator`."""

    entries: "Mapping[str, Leaf | Room]"
    meaning: str
    discriminator: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """what a single model takes for its entries where nobody says anything of them"""


@dataclass(frozen=True)
class Layer:
    """What one file, or the command line, says; later layers lie over earlier ones."""

    name: str
    values: Mapping[str, Any]


def room_of(model: type[Strict], meaning: str = "") -> Room:
    """The tree of `model`."""
    return Room({name: _entry(field) for name, field in model.model_fields.items()}, meaning)


def models_in(annotation: Any) -> Iterator[type[Strict]]:
    """Every model that `annotation` mentions, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def known_keys(model: type[Strict], path: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand at `path` (steps of names and list positions), for every member of a union."""
    found = {model}
    for step in path:
        fields = [
            member.model_fields[step] for member in found if isinstance(step, str) and step in member.model_fields
        ]
        found = {inner for field in fields for inner in models_in(field.annotation)} if fields else found
    return sorted({name for member in found for name in member.model_fields})


def defaults_of(model: type[Strict]) -> dict[str, Any]:
    """The model's default values; nested models opened into mappings, so that a file can change one key of them."""
    fields = {name: field for name, field in model.model_fields.items() if not field.is_required()}
    return {
        name: opened(field.get_default(call_default_factory=True, validated_data={})) for name, field in fields.items()
    }


def opened(value: Any) -> Any:
    """A model as a mapping of its values (not of their serialised form), at every depth; anything else as it is."""
    if not isinstance(value, Strict):
        return value
    return {name: opened(getattr(value, name)) for name in type(value).model_fields}


def _entry(field: FieldInfo) -> Leaf | Room:
    meaning = field.description or ""
    members = _members(field.annotation)
    if not members:
        return Leaf(ImportString if is_import(*field.metadata) else field.annotation, meaning)
    tag = next((tag for tag in (field.discriminator, *_tags(field.annotation)) if isinstance(tag, str)), None)
    entries: dict[str, Leaf | Room] = {}
    for member in members:
        for name, entry in room_of(member).entries.items():
            entries[name] = _shared(entries.get(name), _when(entry, member, tag) if name != tag else entry)
    defaults = defaults_of(members[0]) if len(members) == 1 else {}
    return Room(entries, meaning or (members[0].__doc__ or ""), tag, defaults)


def _members(annotation: Any) -> tuple[type[Strict], ...]:
    """The models of `Model`, `Model | None` or `Model | Other`; none when anything else may stand there."""
    options = [option for option in _options(annotation) if option is not type(None)]
    models = tuple(option for option in options if isinstance(option, type) and issubclass(option, Strict))
    return models if len(models) == len(options) else ()


def _options(annotation: Any) -> tuple[Any, ...]:
    """What may stand in a union's place; a union told apart by a tag is opened inside of another."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(option for argument in get_args(annotation) for option in _options(argument))
    return (annotation,)


def _tags(annotation: Any) -> Iterator[Any]:
    """The discriminators of the unions inside of a union."""
    for argument in get_args(annotation):
        if get_origin(argument) is Annotated:
            yield from (said.discriminator for said in get_args(argument)[1:] if isinstance(said, FieldInfo))


def _when(entry: Leaf | Room, member: type[Strict], tag: str | None) -> Leaf | Room:
    """The entry, marked as belonging to the union member that `tag` chooses."""
    if tag is None:
        return entry
    if isinstance(entry, Room):
        return replace(entry, entries={name: _when(inner, member, tag) for name, inner in entry.entries.items()})
    return replace(entry, condition=f"{tag} {get_args(member.model_fields[tag].annotation)[0]}")


def _shared(one: Leaf | Room | None, other: Leaf | Room) -> Leaf | Room:
    """What two members of a union call by the same name: it may hold what either allows."""
    if isinstance(one, Leaf) and isinstance(other, Leaf):
        condition = " or ".join(filter(None, (one.condition, other.condition)))
        return replace(one, annotation=Union[one.annotation, other.annotation], condition=condition)  # noqa: UP007
    if isinstance(one, Room) and isinstance(other, Room):
        shared = {name: _shared(one.entries.get(name), entry) for name, entry in other.entries.items()}
        return replace(one, entries={**one.entries, **shared})
    return other
