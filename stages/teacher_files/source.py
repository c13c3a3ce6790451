"""Which files a teacher is made of: the value that a user writes behind `--teacher`, and that a run remembers."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from configs.values import Location, Strict

LOCATION_TEXT = "diffusers folder, hub id (with @revision), or one .safetensors, .ckpt or .pt file of an SD-1.x model"


class LoraFile(Strict):
    """One LoRA that is merged into a teacher before it is used; a text alone is its file."""

    text_form: ClassVar[str] = "FILE"

    file: Location = Field(description="a .safetensors file with kohya's or diffusers' names")
    scale: float = Field(1.0, description="factor of its difference, as UIs write it behind the name of a LoRA")

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class MixedModel(Strict):
    """A fine-tune of a teacher, and how much of its difference to the teacher is added."""

    model: Location = Field(description=LOCATION_TEXT)
    weight: float = Field(description="factor of its difference to the teacher: 1 alone gives the fine-tune itself")

    @model_validator(mode="before")
    @classmethod
    def _refuse_model_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"should have a weight beside the model - write {{model: {value}, weight: 0.5}}")
        return value

    @field_validator("weight")
    @classmethod
    def _refuse_zero(cls, value: float) -> float:
        if value == 0:
            raise ValueError("should be another number than 0, which adds nothing - leave the model out")
        return value


class TeacherMove(Strict):
    """Where a recorded teacher and its parts lie now; a text alone is its location, and what is left out stays."""

    shorthand: ClassVar[str] = "location"

    location: Location | None = Field(None, description=LOCATION_TEXT)
    parts_from: Location | None = Field(
        None, description="folder, hub id or file with the autoencoder and text encoder of a file that is a UNet alone"
    )
    config: Location | None = Field(
        None, description="folder or hub id with configs and tokenizer of a single file; none takes SD1.5's own"
    )
    vae: Location | None = Field(None, description="folder, hub id or file of another autoencoder")
    mix: tuple[MixedModel, ...] = Field(
        (), description="fine-tunes whose differences to the teacher are added to it, weighted, before anything else"
    )
    loras: tuple[LoraFile, ...] = Field((), description="LoRA files that are merged first, in this order")
    clip_skip: int = Field(
        0, ge=0, description="last layers of the text encoder that are left out, as diffusers counts them: 1 is what "
        "other programs call clip skip 2"
    )  # fmt: skip
    averaged: bool = Field(False, description="take the averaged (EMA) weights of a file that holds both")
    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the network predicts; auto measures it, and refuses a config that contradicts"
    )
    zero_terminal_snr: Literal["auto", "true", "false"] = Field(
        "auto", description="whether its schedule ends without signal; auto measures it likewise"
    )

    @field_validator("zero_terminal_snr", mode="before")
    @classmethod
    def _truth_as_text(cls, value: Any) -> Any:
        return str(value).lower() if isinstance(value, bool | str) else value

    @model_validator(mode="before")
    @classmethod
    def _location_alone(cls, value: Any) -> Any:
        return {"location": value} if isinstance(value, str) else value

    def over(self, recorded: "TeacherSource") -> "TeacherSource":
        """The recorded source with what is given here in the place of what was recorded."""
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) != _default(name)}
        return recorded.model_copy(update=given)


class TeacherSource(TeacherMove):
    """A teacher as it lies on a disk or on a hub; a text alone is its location."""

    location: Location = Field(description=LOCATION_TEXT)

    def at(self, location: str) -> "TeacherSource":
        """The same at another location."""
        return self.model_copy(update={"location": location})

    def absolute(self) -> "TeacherSource":
        """The same with paths that do not depend on the working directory; hub ids stay."""
        names = ("location", "parts_from", "config", "vae")
        places = {name: _absolute(value) for name in names if (value := getattr(self, name)) is not None}
        loras = tuple(lora.model_copy(update={"file": _absolute(lora.file)}) for lora in self.loras)
        mix = tuple(one.model_copy(update={"model": _absolute(one.model)}) for one in self.mix)
        return self.model_copy(update={**places, "loras": loras, "mix": mix})


def _absolute(location: str) -> str:
    return str(Path(location).absolute()) if Path(location).exists() else location


def _default(name: str) -> Any:
    return TeacherMove.model_fields[name].default
