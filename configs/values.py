"""The base classes of models, and the types and checks of values that users write: paths, text, numbers."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    field_validator,
    model_validator,
)

from stages.system.refusal import first_invalid_character, invalid_character_reason
from stages.system.storage.locations import map_locations, refuse_half_location

MAX_INTEGER = (1 << 63) - 1
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of Linux


def expand_home(path: Path) -> Path:
    """The path with a leading `~` or `~user` expanded; raises `ValueError` for what can name no file."""
    if fault := invalid_character_reason(str(path)):
        raise ValueError(f"a file name {fault} ({first_invalid_character(str(path))}) - rename it")
    if "\n" in str(path) or "\r" in str(path):
        raise ValueError("a file name of several lines - rename it")
    refuse_half_location(path)
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no user {path.parts[0][1:]!r} here - write the whole path") from error
    if len(os.fsencode(path)) > MAX_PATH_BYTES or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise ValueError(f"a file name of more than {MAX_NAME_BYTES} bytes - take a shorter one")
    return path


def expand_location(location: str) -> str:
    """A folder, its `~` expanded, or a hub id, which begins with no `~` and is shorter than a path may be.

    Raises `ValueError` for what can name neither.
    """
    location = map_locations(location)
    if not location.strip():
        raise ValueError("should name a folder, a file or a hub id")
    if "\n" in location or "\r" in location:
        raise ValueError("a name of several lines - rename it")
    return str(expand_home(Path(location))) if location.startswith("~") or len(location) > MAX_NAME_BYTES else location


def normalize_value(value: Any) -> Any:
    """The value with `~` in each of its paths expanded; raises `ValueError` for what no user can mean."""
    match value:
        case Path():
            return expand_home(value)
        case str() if fault := invalid_character_reason(value):
            raise ValueError(f"text {fault} ({first_invalid_character(value)}) - remove them")
        case bool() | str():
            return value
        case int() if abs(value) > MAX_INTEGER:
            raise ValueError("should fit 64 bits - take a smaller number")
        case tuple() if type(value) is tuple:
            return tuple(map(normalize_value, value))
        case list():
            return [normalize_value(item) for item in value]
        case dict():
            return {normalize_value(key): normalize_value(item) for key, item in value.items()}
    return value


def refuse_blank(value: str) -> str:
    """The value; raises `ValueError` for white space only."""
    if not value.strip():
        raise ValueError("should be a word or more")
    return value


def refuse_falling(span: tuple[float, float]) -> tuple[float, float]:
    """The lowest and the highest of a range; raises `ValueError` where they fall, or begin below 0."""
    lowest, highest = span
    if not 0 <= lowest <= highest:
        raise ValueError(f"{lowest} {highest} should rise from a number not below 0")
    return span


Location = Annotated[str, AfterValidator(expand_location)]
"""A folder or a hub id."""
NonEmpty = Annotated[str, AfterValidator(refuse_blank)]
"""Text that is not blank."""
Range = Annotated[tuple[float, float], AfterValidator(refuse_falling)]
"""A lowest and a highest number, from 0."""


class Stored(BaseModel):
    """A frozen model that refuses unknown keys and checks its own defaults.

    A field's meaning, with its unit, is `Field(description=...)` or the string below the attribute; `--help` prints it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def _holds_paths(annotation: Any) -> bool:
    """Whether a field's values are paths, or lists of them."""
    return annotation is Path or any(map(_holds_paths, get_args(annotation)))


class Strict(Stored):
    """A model of what users write: finite floats, integers of 64 bits, text without controls, `~` in paths expanded."""

    model_config = ConfigDict(allow_inf_nan=False)

    def unused_keys(self) -> Mapping[str, str]:
        """Keys that these settings make without effect, each with the way out; an option that sets one is refused."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _map_locations(cls, values: Any) -> Any:
        """Each location in the place of a path becomes its working folder; `expand_home` refuses what names none."""
        if not isinstance(values, dict):
            return values
        mapped = dict(values)
        for name, field in cls.model_fields.items():
            if name in values and _holds_paths(field.annotation):
                with suppress(ValueError):
                    mapped[name] = map_locations(values[name])
        return mapped

    @field_validator("*")
    @classmethod
    def _normalize(cls, value: Any) -> Any:
        return normalize_value(value)


SIZE_TEXT = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, order=True)
class PictureSize:
    """Width and height of a picture in pixels, written 512x768: the width first, so this one is upright."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    @classmethod
    def parse(cls, value: object) -> "PictureSize":
        """The size that a text such as 512x768 means; raises `ValueError` for any other value."""
        if isinstance(value, cls):
            return value
        match = SIZE_TEXT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError("should be WIDTHxHEIGHT in pixels, such as 512x768")
        return cls(int(match[1]), int(match[2]))


Size = Annotated[PictureSize, BeforeValidator(PictureSize.parse), PlainSerializer(str, return_type=str)]
"""A picture size in a config or a stored file, as text."""
