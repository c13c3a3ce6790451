"""All that steers a run of training."""

from typing import Literal

from pydantic import Field

from configs.strict import Strict
from stages.train.ema import EmaConfig
from stages.train.optim import OptimizerConfig
from stages.train.trackers import TrackingConfig


class TrainConfig(Strict):
    """How long, how fast and how often; one sample is one state with both guidance branches."""

    max_samples: int = Field(
        48_000, ge=1, description="samples after which training is over, counted from its beginning"
    )
    batch_size: int = Field(32, ge=1, description="states a step; the student sees each of them under both branches")
    seed: int = Field(0, description="seed of the order of the data and of every draw in training")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    embedding_jitter: float = Field(
        0.5, ge=0, description="half-width of the jitter on the time that the student is told, in units of 1000 s"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast on an accelerator; weights stay fp32, and a CPU always computes in fp32"
    )
    journal_every_samples: int = Field(640, ge=1, description="samples between two lines of the journal")
    checkpoint_every_samples: int = Field(12_800, ge=1, description="samples between two checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")
    tracking: TrackingConfig = TrackingConfig()
