"""What pydantic found wrong with a configuration, in lines that name the key's full path, the value and the way out."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from configs.characters import printable
from configs.options import flag
from configs.refusal import did_you_mean
from configs.schema import Layer, known_keys
from configs.strict import Strict

Place = tuple[str | int, ...]


def judgement(
    error: ValidationError, config_type: type[Strict], section: str, values: Mapping[str, Any], layers: Sequence[Layer]
) -> str:
    """One line for each slip in `values`, which `layers` made up."""
    lines: dict[str, str] = {}
    for slip in error.errors(include_url=False):
        path, value = _place(slip, values), slip["input"]
        if slip["type"].startswith("union_tag"):
            path, value = (*path, slip["ctx"]["discriminator"].strip("'")), slip["ctx"].get("tag")
        head = _head(slip["type"], path, value, section, layers)
        said = _said(slip, path, config_type)
        # The members of an untagged union complain one by one about the same value: their wishes make one line.
        lines[head] = f"{lines[head]}, or {said}" if head in lines else said
    return "\n".join(f"{head}: {said}" for head, said in lines.items())


def slip_of(error: ValidationError, model: type[Strict], content: Any) -> tuple[Place, str]:
    """Where the first slip of a file's content lies, and its value with what would be right."""
    slip = error.errors(include_url=False)[0]
    place, value = _place(slip, content), slip["input"]
    if slip["type"] == "missing":
        return place, "required - write it there"
    wanted = _said(slip, place, model)
    if not place or isinstance(value, Mapping | Strict):
        return place, wanted
    return place, f"{printable(value)}: {wanted}"


def _place(slip: ErrorDetails, values: Any) -> Place:
    """pydantic's location without the names of union members, which are no keys of the file."""
    place: list[str | int] = []
    for step in slip["loc"]:
        found, inner = _step(values, step)
        if found or (slip["type"] == "missing" and step == slip["loc"][-1]):
            place.append(step)
            values = inner
    return tuple(place)


def _step(values: Any, step: str | int) -> tuple[bool, Any]:
    """Whether `values` has something at `step`, and what."""
    if isinstance(values, Mapping) and step in values:
        return True, values[step]
    if isinstance(values, list | tuple) and isinstance(step, int) and step < len(values):
        return True, values[step]
    return False, values


def _head(kind: str, place: Place, value: Any, section: str, layers: Sequence[Layer]) -> str:
    """Where it was said, the key's full path, and the value when there is one and it is short enough to show."""
    key = ".".join(map(str, (section, *place)))
    if kind in ("missing", "union_tag_not_found") or (kind == "value_error" and isinstance(value, Mapping | Strict)):
        return key
    source = next((f"{layer.name}: " for layer in reversed(layers) if _speaks_of(layer.values, place)), "")
    if isinstance(value, Mapping | Strict):
        return f"{source}{key}"
    return f"{source}{key} = {printable(value)}"


def _speaks_of(values: Any, place: Place) -> bool:
    for step in place:
        found, values = _step(values, step)
        if not found:
            return False
    return True


def _said(slip: ErrorDetails, place: Place, config_type: type[Strict]) -> str:
    kind = slip["type"]
    if kind == "extra_forbidden":
        return f"unknown key - {did_you_mean(str(place[-1]), known_keys(config_type, place[:-1]))}"
    if kind == "union_tag_invalid":
        return f"should be one of {slip['ctx']['expected_tags']}"
    if kind in ("missing", "union_tag_not_found"):
        names = [step for step in place if isinstance(step, str)]
        option = f" or give {flag(names)}" if len(names) == len(place) else ""
        return f"required - write it in a YAML file{option}"
    said = " ".join(slip["msg"].removeprefix("Value error, ").split())
    return said.replace("Input should", "should", 1)
