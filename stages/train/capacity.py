"""How many processes can share a run's batches on this machine."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from configs.refusal import Refused
from shards.manifest import Manifest
from shards.reader import TWO_GIB
from stages.memory import refuse_too_many
from stages.nets.anatomy import check_anatomy
from stages.nets.files import read_json
from stages.train.config import TrainConfig
from stages.train.machine import uneven

BYTES_OF_TEACHER_AND_STUDENT = 4 + 4
BYTES_OF_GRADIENT_AND_AVERAGE = 4 + 4
BYTES_OF_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "muon": 4}
"""Of each number of the UNet, at least, in every process."""


def refuse_launch(
    train: TrainConfig, processes: int, device: torch.device, teacher: Path, cache: Path, *, adapters_only: bool = False
) -> None:
    """Raise `Refused` unless each process gets rows of every batch, and this machine holds so many; none is started."""
    if slip := uneven(train.batch_size, processes, train.accumulate):
        raise Refused(f"processes = {processes}: {slip}, or other processes")
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise Refused(f"processes = {processes}: there are {torch.cuda.device_count()} GPUs - one process for each")
    held = 0 if adapters_only else BYTES_OF_GRADIENT_AND_AVERAGE + BYTES_OF_MOMENTS[train.optimizer.kind]
    read = sum(shard.bytes for shard in Manifest.open(cache).of("train"))
    refuse_too_many(
        "processes",
        processes,
        parameters(teacher) * (BYTES_OF_TEACHER_AND_STUDENT + held) + (read if read <= TWO_GIB else 0),
        device,
    )


def parameters(teacher: Path) -> int:
    """The numbers in a teacher's UNet, from its config alone."""
    check_anatomy(teacher)
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_json(teacher / "unet" / "config.json"))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError):
        return 0  # each process refuses it when it loads it, and says why
    return sum(parameter.numel() for parameter in unet.parameters())
