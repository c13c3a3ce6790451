"""The ground under every model: what users write, and what the program wrote for itself."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from configs.values import expand_location, plain, refuse_blank

Location = Annotated[str, AfterValidator(expand_location)]
"""A folder or a hub id."""
NonEmpty = Annotated[str, AfterValidator(refuse_blank)]
"""Words: not nothing."""


class Stored(BaseModel):
    """A frozen model that refuses unknown keys and checks its own defaults.

    A field's meaning, with its unit, is `Field(description=...)` or the string below the attribute; `--help` prints it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Strict(Stored):
    """A model of what users write: floats are finite, integers fit 64 bits, text is text, `~` in a path is opened."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)
