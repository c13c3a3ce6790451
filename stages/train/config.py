"""All that steers a run of training."""

from pydantic import Field

from configs.strict import Strict
from stages.train.ema import EmaConfig
from stages.train.machine import Precision
from stages.train.optim import OptimizerConfig
from stages.train.retention import KeepConfig
from stages.train.trackers import TrackingConfig


class TrainConfig(Strict):
    """How long, how fast and how often; one sample is one state with both guidance branches."""

    max_samples: int = Field(
        48_000, ge=1, description="samples after which training is over, counted from its beginning"
    )
    batch_size: int = Field(
        32, ge=1, description="states a step, of all processes; the student sees each of them under both branches"
    )
    seed: int = Field(0, description="seed of the order of the data and of every draw in training")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    embedding_jitter: float = Field(
        0.5, ge=0, description="half-width of the jitter on the time that the student is told, 0 to 1000"
    )
    precision: Precision = Field(
        "fp32",
        description="bf16, fp16: autocast on an accelerator (fp16 with scaled losses); weights stay fp32, and a CPU "
        "always computes in fp32",
    )
    accumulate: int = Field(
        1, ge=1, description="micro-batches of each process, one after the other, whose gradients make one step"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the inside of each block twice instead of keeping it: less memory, more time"
    )
    compile: bool = Field(False, description="let torch.compile fuse the UNet's operations; slow first steps")
    channels_last: bool = Field(False, description="lay the UNet out for the convolutions of recent GPUs")
    max_skips: int = Field(5, ge=1, description="steps in a row without a finite gradient that end the run")
    spike_sigmas: float = Field(
        6.0, gt=0, description="deviations above the running mean of log loss from which a loss is journaled as a spike"
    )
    journal_every_samples: int = Field(640, ge=1, description="samples between two lines of the journal")
    checkpoint_every_samples: int = Field(12_800, ge=1, description="samples between two checkpoints")
    keep: KeepConfig = KeepConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return -(-self.max_samples // self.batch_size)

    @property
    def samples(self) -> int:
        """Samples seen at its end: `max_samples`, or the next whole batch."""
        return self.steps * self.batch_size
