"""A teacher that a cache or a run remembers: where it is looked for, and whether it is still the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.system.refusal import Refused
from stages.system.storage.attached import attach_all
from stages.system.storage.locations import map_locations, show_locations
from stages.teacher_files.base import lies_here, locate
from stages.teacher_files.folder import changed_components, digests_as_recorded
from stages.teacher_files.open import TeacherFolder, open_teacher_files
from stages.teacher_files.source import TeacherSource


def recorded_sources(location: str, path: str | None, source: Mapping[str, Any] | None) -> tuple[TeacherSource, ...]:
    """Where to look for a recorded teacher: its location as named, then the absolute path of then.

    Raises `Refused` for a broken record.
    """
    try:
        recorded = TeacherSource.model_validate(source or {"location": location})
    except ValidationError as error:
        raise Refused("teacher: its record cannot be read - say where it lies with --teacher") from error
    places = map_locations([location, *([path] if path else [])])
    return tuple(recorded.at(place) for place in dict.fromkeys(places))


MOVE_OPTION = "--teacher"
"""The option that says where a teacher lies now that moved."""


def find_teacher(sources: Sequence[TeacherSource], option: str = MOVE_OPTION) -> TeacherFolder:
    """A teacher, opened where a model lies, or else from its hub repository.

    Raises `Refused` when it lies in none of the places any more; `option` says where it lies now.
    """
    return open_teacher_files(find_source(sources, option))


def find_source(sources: Sequence[TeacherSource], option: str = MOVE_OPTION) -> TeacherSource:
    """The first source at which a model lies, or else a hub repository; raises `Refused` as `find_teacher` does."""
    for source in sources:
        attach_all(source.model_dump())
        if lies_here(source.location):
            return source
    try:
        locate(sources[0].location)
    except Refused as refusal:
        gone = " or ".join(repr(source.location) for source in sources)
        raise Refused(
            f"teacher: {gone}: no model lies there any more, and no hub repository that can be reached is called so - "
            f"say where it lies now with {option}"
        ) from refusal
    return sources[0]


def absolute_place(location: str) -> str | None:
    """The absolute path of a folder or file, or the location in whose working folder it lies; None for a hub id."""
    return str(show_locations(str(Path(location).absolute()))) if Path(location).exists() else None


def changed_parts(recorded: Mapping[str, str], files: TeacherFolder) -> list[str]:
    """The components that are others than a recipe recorded; raises `Refused` as `changed_components` does."""
    if not files.is_composed:
        return changed_components(recorded, files.folder)
    return [part for part, sha256 in recorded.items() if files.digests.get(part) != sha256]


def identity_as_recorded(recorded: object, files: TeacherFolder) -> dict[str, str]:
    """The digests of a teacher; of unchanged components of a plain folder as an earlier recipe recorded them."""
    return dict(files.digests) if files.is_composed else digests_as_recorded(recorded, files.folder)
