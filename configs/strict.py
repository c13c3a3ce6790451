"""The ground under every configuration model."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and checks its own defaults.

    A field's meaning, with its unit, is `Field(description=...)` or the string below the attribute; `--help` prints it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)
