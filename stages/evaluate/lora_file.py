"""A LoRA and its scale as the user writes them, FILE or FILE:SCALE."""

import math
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from stages.system.text import split_number
from stages.teacher_files.source import LoraFile


class ScaledLora(LoraFile):
    """A LoRA file and the scale at which it is measured; a text alone is FILE or FILE:SCALE."""

    text_form: ClassVar[str] = "FILE[:SCALE]"

    scale: float = Field(1.0, description="factor of its difference, not zero")

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        """Split at the last colon if a number follows: other colons are part of the file's name."""
        if not isinstance(value, str):
            return value
        file, scale = split_number(value)
        if scale is None:
            return {"file": value}
        if not math.isfinite(scale):
            written = value.rpartition(":")[2]
            raise ValueError(f"scale {written}: is not a finite number - give another behind the last colon")
        return {"file": file, "scale": scale}

    @model_validator(mode="after")
    def _refuse_no_scale(self) -> "ScaledLora":
        if self.scale == 0:
            raise ValueError("scale 0: then there is nothing to measure - give another behind the last colon")
        return self

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.file).stem
