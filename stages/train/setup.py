"""The configuration and the identity of a training run, and what is refused before it writes anything."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field, model_validator
from torch import nn

from configs.values import PictureSize, Strict
from shards.manifest import Manifest
from shards.reader import DEFAULT_MEMORY_BUDGET_BYTES
from stages.nets.latents import LatentGeometry
from stages.nets.student import Student
from stages.nets.student_shape import Prune, prune_unet
from stages.system.memory import refuse_too_many
from stages.system.refusal import Refused
from stages.system.storage.remote_claim import claim_place
from stages.teacher_files.architecture import check_sd1_architecture
from stages.teacher_files.folder import read_json
from stages.train.checkpoint import Checkpoints, Resume
from stages.train.checkpoint_store import KeepConfig
from stages.train.ema import EmaConfig
from stages.train.objective import Objective
from stages.train.optim import OptimizerConfig, build_optimizer
from stages.train.runtime import Precision, Runtime
from stages.train.state import checkpoint_bytes
from stages.train.trackers import TrackingConfig, refuse_missing_trackers

MAX_TRIES = 10_000
"""Numbers of pixels that are tried for one that works; more are far beyond any card."""


class TrainConfig(Strict):
    """How long, how fast and how often; one sample is one state with both guidance branches."""

    section: ClassVar[str] = "train"
    """Where a command has these settings, for messages."""

    max_samples: int = Field(
        48_000, ge=1, description="samples after which training is over, counted from its beginning"
    )
    batch_size: int = Field(
        32, ge=1, description="states a step, of all processes; the student sees each of them under both branches"
    )
    batch_pixels: int | None = Field(
        None,
        ge=1,
        description="pixels a step, of all processes, in place of batch_size: as many states as have no more, at least "
        "one, so that a step takes the same memory at each picture size (16 states of 512x512 are 4194304); none: "
        "batch_size states at every size",
    )
    seed: int = Field(0, description="seed of the order of the data and of every random number in training")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    embedding_jitter: float = Field(
        0.5, ge=0, description="half-width of the jitter on the student's time input, 0 to 1000"
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
    shard_moments: bool = Field(
        False,
        description="with several processes: each keeps its part of AdamW's moments, updates that part of the weights "
        "and sends it to the others - less memory, more traffic, same bits (Muon's momenta are always shared so)",
    )
    max_skips: int = Field(5, ge=1, description="steps in a row without a finite gradient that end the run")
    spike_sigmas: float = Field(
        6.0, gt=0, description="deviations above the running mean of log loss from which a loss is journaled as a spike"
    )
    journal_every_samples: int = Field(640, ge=1, description="samples between two lines of the journal")
    checkpoint_every_samples: int = Field(12_800, ge=1, description="samples between two checkpoints")
    keep: KeepConfig = KeepConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_shards(self) -> "TrainConfig":
        if self.shard_moments and self.optimizer.kind == "adamw_8bit":
            raise ValueError(
                f"shard_moments: optimizer.kind {self.optimizer.kind} has packed moments, which are not shared - take "
                "kind adamw or muon, or leave shard_moments out"
            )
        return self

    @property
    def shares_moments(self) -> bool:
        """Whether several processes keep a part each of most moments: those of AdamW if wanted, of Muon always."""
        return self.shard_moments or self.optimizer.kind == "muon"

    def rows_of(self, size: PictureSize) -> int:
        """States a step of one picture size."""
        return rows_of(size, self.batch_size, self.batch_pixels)


CLAIM_PURPOSE = "train in"
NON_IDENTITY_FIELDS = {
    "journal_every_samples",
    "checkpoint_every_samples",
    "keep",
    "max_skips",
    "spike_sigmas",
    "tracking",
    "shard_moments",
}
ARITHMETIC_FIELDS = {"accumulate", "gradient_checkpointing", "compile", "channels_last"}
"""No part of the identity either, but a change is printed: a resumed run has other last bits."""


def run_checkpoints(
    folder: Path, config: TrainConfig, objective: Objective, identity: Mapping[str, Any]
) -> Checkpoints:
    """The checkpoints of a run folder; `identity` is what the weights depend on beyond `config` and objective."""
    # A run without batch_pixels has the identity that it had before there was such a setting.
    absent = {"batch_pixels"} if config.batch_pixels is None else set[str]()
    train = config.model_dump(mode="json", exclude=NON_IDENTITY_FIELDS | ARITHMETIC_FIELDS | absent)
    identity = {**identity, "train": train, "objective": objective.config.identity()}
    return Checkpoints(folder / "checkpoints", identity, config.keep, config.section)


def refuse_start(
    student: Student,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    runtime: Runtime,
    identity: Mapping[str, Any],
    resume: Resume = "auto",
    unknown_keys: Collection[str] = (),
    sizes: Sequence[PictureSize] = (),
) -> None:
    """Raise `Refused` for whatever `fit` would refuse before its first step; nothing changes.

    `unknown_keys` names the keys of the identity that are not known yet, `sizes` are those of the batches.
    """
    refuse_uneven_batches(config, runtime, sizes)
    build_optimizer(config.optimizer, trainable_parameters(student))
    refuse_missing_trackers(config.tracking, config.section)
    checkpoints = run_checkpoints(folder, config, objective, identity)
    checkpoints.refuse_other_runs(resume, unknown_keys)
    checkpoints.refuse_small_disk(checkpoint_bytes(student))


def rows_of(size: PictureSize, batch_size: int, batch_pixels: int | None) -> int:
    """Rows of a whole batch of one size: `batch_size`, or as many as have no more than `batch_pixels`, at least one."""
    return batch_size if batch_pixels is None else max(1, batch_pixels // size.pixels)


def batch_rows(sizes: Sequence[PictureSize], batch_size: int, batch_pixels: int | None) -> dict[PictureSize, int]:
    """Rows of a whole batch of each size."""
    return {size: rows_of(size, batch_size, batch_pixels) for size in sizes}


def batch_split_error(
    batch_size: int,
    world: int,
    accumulate: int,
    batch_pixels: int | None = None,
    sizes: Sequence[PictureSize] = (),
    section: str = TrainConfig.section,
) -> str | None:
    """Why the batches cannot be split among so many processes and micro-batches; None when they can.

    `section` is where the command has these settings.
    """
    parts = world * accumulate
    among = f"among {world} processes x {section}.accumulate = {accumulate} micro-batches"
    if batch_pixels is None:
        if batch_size % parts == 0:
            return None
        return f"{section}.batch_size = {batch_size}: does not divide {among} - choose a multiple of {parts}"
    rows = batch_rows(sizes, batch_size, batch_pixels)
    if not any(number % parts for number in rows.values()):
        return None
    larger = next_batch_pixels(sizes, batch_pixels, parts)
    way_out = f"take {larger}" if larger else f"lower {section}.accumulate, now {accumulate}"
    return (
        f"{section}.batch_pixels = {batch_pixels}: gives {rows_text(rows)}, and each of these numbers should divide "
        f"{among} - {way_out}"
    )


def next_batch_pixels(sizes: Sequence[PictureSize], batch_pixels: int, parts: int) -> int | None:
    """The least number of pixels from `batch_pixels` on whose rows at each size are a multiple of `parts`."""
    for number in count():
        uneven = [size for size in sizes if rows_of(size, 0, batch_pixels) % parts]
        if not uneven:
            return batch_pixels
        if number == MAX_TRIES:
            break
        # Up to the next multiple of one size nothing can work; other sizes are looked at again from there.
        batch_pixels = max((rows_of(size, 0, batch_pixels) // parts + 1) * parts * size.pixels for size in uneven)
    return None


def rows_text(rows: Mapping[PictureSize, int]) -> str:
    """The rows of each size, such as `16 rows of 512x512, 10 of 512x768`."""
    (first, number), *others = rows.items()
    return ", ".join([f"{number} {'row' if number == 1 else 'rows'} of {first}", *(f"{n} of {s}" for s, n in others)])


def refuse_uneven_batches(config: TrainConfig, runtime: Runtime, sizes: Sequence[PictureSize] = ()) -> None:
    """Raise `Refused` unless each micro-batch of each process gets as many rows of every batch of these sizes."""
    if error := _split_error(config, runtime.world, sizes):
        raise runtime.refusal(error)


def _split_error(config: TrainConfig, world: int, sizes: Sequence[PictureSize]) -> str | None:
    return batch_split_error(
        config.batch_size, world, config.accumulate, config.batch_pixels, sizes, section=config.section
    )


def claim_on_main(folder: Path, runtime: Runtime) -> AbstractContextManager[None]:
    """The run folder, claimed by the main process for all processes of a run; see `claim_place`."""
    return claim_place(folder, CLAIM_PURPOSE) if runtime.is_main else nullcontext()


def trainable_parameters(student: Student) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


BYTES_OF_WEIGHTS = 4
BYTES_OF_GRADIENT_AND_AVERAGE = 4 + 4
BYTES_OF_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "muon": 4}
"""Of each parameter of the UNet, at least, in every process that keeps all moments."""


def refuse_launch(
    train: TrainConfig,
    processes: int,
    device: torch.device,
    teacher: Path,
    cache: Path,
    *,
    sizes: Sequence[PictureSize] = (),
    adapters_only: bool = False,
    prune: Prune = "none",
) -> None:
    """Raise `Refused` unless each process gets rows of every batch, and the device's memory is enough for all.

    `sizes` are those of the batches, as far as they are known; `prune` is what the student is made without.
    """
    if error := _split_error(train, processes, sizes):
        raise Refused(f"processes = {processes}: {error}, or other processes")
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise Refused(f"processes = {processes}: there are {torch.cuda.device_count()} GPUs - one process for each")
    bytes_of_parameter = float(BYTES_OF_WEIGHTS)  # of the student; the teacher has its weights alone
    if not adapters_only:
        keepers = processes if train.shares_moments else 1
        bytes_of_parameter += BYTES_OF_GRADIENT_AND_AVERAGE + BYTES_OF_MOMENTS[train.optimizer.kind] / keepers
    cache_bytes = sum(shard.bytes for shard in Manifest.open(cache).shards_of("train"))
    held_bytes = cache_bytes if cache_bytes <= DEFAULT_MEMORY_BUDGET_BYTES else 0
    own_bytes = round(count_parameters(teacher, prune) * bytes_of_parameter)
    needed = count_parameters(teacher) * BYTES_OF_WEIGHTS + own_bytes + held_bytes
    refuse_too_many("processes", processes, needed, device)


def training_sizes(cache: Path, teacher: Path) -> list[PictureSize]:
    """The picture sizes of a cache's training split; of a cache that does not tell its size, its teacher's own."""
    sizes = Manifest.open(cache).sizes_of("train")
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else [native_size(teacher)]


def native_size(teacher: Path) -> PictureSize:
    """The picture size that a teacher was made for, from its configs alone."""
    unet, vae = (read_json(teacher / part / "config.json") for part in ("unet", "vae"))
    return LatentGeometry.from_configs(unet, vae).native_size


def count_parameters(teacher: Path, prune: Prune = "none") -> int:
    """The number of parameters of a teacher's UNet, or of a student pruned from it, from the config alone."""
    check_sd1_architecture(teacher)
    try:
        with torch.device("meta"):
            unet = prune_unet(UNet2DConditionModel.from_config(read_json(teacher / "unet" / "config.json")), prune)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError):
        return 0  # each process refuses it when it loads it, with the reason
    return sum(parameter.numel() for parameter in unet.parameters())
