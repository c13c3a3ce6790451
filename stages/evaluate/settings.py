"""The settings of `sollune evaluate`: what is measured of which pictures."""

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field, ImportString, model_validator

from configs.values import Location, NonEmpty, Size, Strict
from stages.evaluate.gates import Gates
from stages.evaluate.lora_file import ScaledLora
from stages.prompts import PromptSource
from stages.sampling.sampler import Sampler


class FidelityConfig(Strict):
    """Do pictures show what their prompts name? Both models through stock diffusers."""

    prompts: int = Field(500, ge=1, description="validation prompts")
    control_prompts: int = Field(100, ge=1, description="of these, prompts for the student sampled as a noise model")
    steps: int = Field(
        25,
        ge=1,
        description="steps: DDIM for the teacher, the exported scheduler for the student, or its own few",
    )
    guidance: float = Field(5.0, ge=0, description="guidance scale w")


class PairedConfig(Strict):
    """The paired-noise error: fields compared by our own solver."""

    prompts: int = Field(
        256, ge=2, description="validation prompts, the first ones; few pictures carry most of the error"
    )
    steps: tuple[int, ...] = Field((4, 8, 25), min_length=1, description="numbers of steps that are compared")
    reference_steps: int = Field(50, ge=1, description="steps of the teacher's reference")
    sampler: Sampler = Field(Sampler(guidance=3.0), description="solver, guidance and shift; its steps are not used")
    controls: bool = Field(
        True, description="measure the undistilled graft, the undistilled copy and wrong prompts too"
    )
    sizes: tuple[Size, ...] = Field(
        (),
        description="picture sizes, such as 512x768, each with noises, floor and ceiling of its own; none takes those "
        "that the run learnt. Controls and gates are for the native one, or else the first",
    )

    @model_validator(mode="after")
    def _refuse_repeated_sizes(self) -> "PairedConfig":
        repeated = [str(size) for size, times in Counter(self.sizes).items() if times > 1]
        if repeated:
            raise ValueError(f"sizes: {repeated[0]} stands there more than once - name each size once")
        return self


class CocoConfig(Strict):
    """The COCO protocol, for whoever has its data."""

    captions: Path = Field(description="file of captions, such as captions_val2017.json")
    images: Path = Field(description="folder of its photographs")
    count: int = Field(5000, ge=4, description="photographs, each with its first caption; 5000 and 30000 are usual")
    sampler: Sampler = Field(
        Sampler(), description="how the student is sampled; the teacher by Euler's method, as DDIM"
    )


class Config(Strict):
    """Measure a run against its teacher: `sollune evaluate RUN --config FILE`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    prompts: PromptSource | None = Field(
        None,
        description="where the sentences come from, of which the validation share is used; none takes the source of "
        "the run's cache",
    )
    seed: int = Field(1, description="seed of prompts and noises")
    scorer: ImportString[Any] | None = Field(
        None, description="function (texts, pictures) -> attribute -> shown or not; none leaves fidelity out"
    )
    fidelity: FidelityConfig = FidelityConfig()
    paired: PairedConfig = PairedConfig()
    features: NonEmpty | None = Field(
        None,
        description="features for Frechet and kernel distances to the teacher's pictures: MODULE.FUNCTION of pictures "
        "[b 3 h w] in [0, 1] that returns [b d], a folder with a CLIP model, or a TorchScript file of Inception; none "
        "leaves the distances out",
    )
    clip: Location | None = Field(
        None, description="folder or hub repository of a CLIP model, whose score of picture and sentence is measured"
    )
    pictures: tuple[Path, ...] = Field(
        (),
        description="folders of pictures of any other model, each a column beside the student: named by their prompts, "
        "or with a list prompts.json or prompts.csv",
    )
    coco: CocoConfig | None = Field(
        None, description="COCO's captions and photographs: against these alone it is then measured, in RUN/coco.json"
    )
    lora: tuple[ScaledLora, ...] = Field(
        (),
        description="LoRA files made for the teacher, each FILE or FILE:SCALE: they alone are then measured, on the "
        "student against the teacher, and stored in RUN/loras",
    )
    lora_prompts: int = Field(
        64, ge=8, description="validation prompts for each LoRA; the first quarter finds the scale that suits it best"
    )
    velocity_states: int = Field(600, ge=0, description="most held-out states whose velocity is checked; 0 for none")
    gates: Gates = Gates()
    device: str = Field("auto", description="torch device; auto takes a GPU where there is one")
