"""The limits of an evaluation."""

from pydantic import Field

from configs.values import Strict


class Gates(Strict):
    """Limits that a student must keep and its controls must miss; a limit left out is not checked."""

    attribute_loss: float | None = Field(
        None, ge=0, description="most that any attribute may lose to the teacher, 0 to 1"
    )
    score: dict[int, float] = Field(default_factory=dict, description="steps -> highest paired score, 0 to 1")
    velocity_error: float | None = Field(None, ge=0, description="highest held-out relative squared velocity error")
    guidance_error: float | None = Field(None, ge=0, description="highest such error of the guidance difference")
