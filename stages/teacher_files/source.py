"""Which files a teacher is made of: the value that a user writes behind `--teacher`, and that a run remembers."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.values import Location, Strict


class LoraFile(Strict):
    """One LoRA that is merged into a teacher before it is used."""

    file: Location = Field(description="a .safetensors file with kohya's or diffusers' names")
    scale: float = Field(1.0, description="factor of its difference, as UIs write it behind the name of a LoRA")


class TeacherSource(Strict):
    """A teacher as it lies on a disk or on a hub; a text alone is its location."""

    location: Location = Field(
        description="diffusers folder, hub id (with @revision), or one .safetensors, .ckpt or .pt file of an SD-1.x "
        "model"
    )
    parts_from: Location | None = Field(
        None, description="folder, hub id or file with the autoencoder and text encoder of a file that is a UNet alone"
    )
    config: Location | None = Field(
        None, description="folder or hub id with configs and tokenizer of a single file; none takes SD1.5's own"
    )
    vae: Location | None = Field(None, description="folder, hub id or file of another autoencoder")
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

    @model_validator(mode="before")
    @classmethod
    def _location_alone(cls, value: Any) -> Any:
        return {"location": value} if isinstance(value, str) else value
