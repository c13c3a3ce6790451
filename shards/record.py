"""One prompt with everything the teacher said about it: the unit that a shard stores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

SCHEMA = 1
BLOCKS = ("down_0", "down_1", "down_2", "down_3", "mid", "up_0", "up_1", "up_2", "up_3")

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Draws:
    """K states of one prompt and the teacher's velocities there.

    On the teacher's guided trajectory, or x_s = (1-s) x0 + s eps of the finished picture under fresh noise.
    """

    k: Int[Tensor, " K"]
    """int64, the teacher's timestep; its last one for the whole tail beyond it"""
    s: Float[Tensor, " K"]
    """float32 path time, 1 is noise; the time of k, except in the tail"""
    x_t: Float[Tensor, "K c h w"]
    """float16, rounded before the teacher was asked"""
    v_cond: Float[Tensor, "K c h w"]
    v_uncond: Float[Tensor, "K c h w"]
    trajectory: Bool[Tensor, " K"]
    """True: a state of the guided trajectory; False: x0 noised again"""

    def __len__(self) -> int:
        return len(self.s)


@dataclass(frozen=True)
class BlockFeatures:
    """The spatial mean of each block's last resnet, in the conditional branch."""

    by_block: Mapping[str, Float[Tensor, "K n_b"]]
    """float16, in the order in which the blocks run"""


@dataclass(frozen=True)
class Record:
    """One prompt: its sentence, its picture, and K draws."""

    key: str
    """the prompt's index in its split, nine digits"""
    text: str
    class_name: str
    seed: int
    guidance_scale: float
    cond: Float[Tensor, "L d"]
    x0: Float[Tensor, "c h w"]
    draws: Draws
    features: BlockFeatures
