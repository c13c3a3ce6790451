"""Whether David was heard: how much lambda varied because of him."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from stages.david.fusion import PerBlock

SILENT_BELOW = 0.02


def coefficient_of_variation(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over mean along a dimension; a pure number."""
    return values.std(dim=dim, correction=0) / values.mean(dim=dim)


@dataclass(frozen=True)
class Variation:
    """How much lambda varies because of David, over the blocks and over time."""

    over_blocks: float
    over_time: float

    @classmethod
    def of(cls, told: Float[Tensor, "lines n_blocks"], quiet: PerBlock) -> "Variation":
        """Of the lambdas of a journal after the warm-up, relative to those of a faultless student.

        w_b varies over the blocks without David, and is no voice.
        """
        emphasis = told.double() / quiet.double()
        over_blocks = coefficient_of_variation(emphasis.mean(dim=0), 0)
        return cls(float(over_blocks), float(coefficient_of_variation(emphasis, 0).mean()))

    @property
    def silent(self) -> bool:
        """Whether the run was one with static weights."""
        return max(self.over_blocks, self.over_time) < SILENT_BELOW

    def told(self) -> str:
        """One line for the user."""
        said = f"lambda varied by {self.over_blocks:.1%} over the blocks and {self.over_time:.1%} over time"
        return f"David was silent: {said}, as static weights do" if self.silent else f"David spoke: {said}"
