"""Modules of the optional extras."""

import importlib
from typing import Any

from configs.refusal import Refused


def extra(module: str, what: str) -> Any:
    """A module of the optional extra; raises `Refused` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(
            f"prompts: {what} needs the package {module.partition('.')[0]} - pip install 'sollune[datasets]'"
        ) from error
