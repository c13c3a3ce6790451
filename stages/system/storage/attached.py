"""The locations that a command names: brought before it works on them, sent while it does and when it ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from stages.system.refusal import Refused
from stages.system.storage.locations import Location, locations_in, show_locations, shown_here
from stages.system.storage.mirror import Mirror, print_error

ATTACHED_VARIABLE = "SOLLUNE_ATTACHED"
"""Locations that this process, or one that started it, keeps the same."""

_mirrors: list[Mirror] = []


def attach_all(value: Any) -> None:
    """Bring the locations in whose working folders a path, or those of a configuration, lie, until `detach_all`."""
    for location in locations_in(value):
        attach(location)


def attach(location: Location) -> None:
    """Bring a location, and keep it the same from now on; nothing where a process above does so already."""
    attached = os.environ.get(ATTACHED_VARIABLE, "").split("\n")
    if any(Location(*one.split("://", 1)).holds(location) for one in attached if one):
        return
    mirror = Mirror(location)
    mirror.bring()
    _mirrors.append(mirror)
    os.environ[ATTACHED_VARIABLE] = "\n".join([*filter(None, attached), str(location)])
    mirror.start()


class LocationStream:
    """A stream of text in which locations are named in the place of their working folders."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; the characters of what was written."""
        return self._stream.write(show_locations(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _shown_locations() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, LocationStream(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def detach_all() -> None:
    """Send what is left of every location; raises the first error after all were tried, and prints the others."""
    errors: list[Exception] = []
    while _mirrors:
        mirror = _mirrors.pop()
        attached = os.environ.get(ATTACHED_VARIABLE, "").split("\n")
        os.environ[ATTACHED_VARIABLE] = "\n".join(one for one in attached if one != str(mirror.location))
        try:
            mirror.close()
        except Refused as refusal:
            errors.append(Refused(f"{refusal} (everything is still in {shown_here(mirror.folder)})"))
        except Exception as error:  # of any kind: the other locations are sent all the same
            errors.append(error)
    for other in errors[1:]:
        print_error(other)
    if errors:
        raise errors[0]


@contextmanager
def attached_locations() -> Iterator[None]:
    """Detach when the block ends; when it raises, that error stays the one that is raised.

    What the block prints names locations.
    """
    with _shown_locations():
        try:
            yield
        except BaseException:
            try:
                detach_all()
            except Exception as error:
                print_error(error)
            raise
        detach_all()
