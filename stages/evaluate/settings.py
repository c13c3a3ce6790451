"""What `sollune evaluate` measures of pictures, and with which settings."""

from collections import Counter

from pydantic import Field, model_validator

from configs.values import Size, Strict
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
