"""What is refused before a run of training writes anything: another run's folder, a batch, a library, a full disk."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from configs.claim import claimed
from stages.nets.student import Student
from stages.train.checkpoint import Checkpoints, Elsewhere, Resume
from stages.train.config import TrainConfig
from stages.train.machine import Machine
from stages.train.objective import Objective
from stages.train.optim import build_optimizer
from stages.train.state import checkpoint_bytes
from stages.train.trackers import refuse_missing

FREE_TO_CHANGE = {"journal_every_samples", "checkpoint_every_samples", "keep", "max_skips", "spike_sigmas", "tracking"}
PURPOSE = "train in"
ARITHMETIC = {"accumulate", "gradient_checkpointing", "compile", "channels_last"}
"""Free to change as well, but not without a word: a run goes on with other last bits."""


def refuse_start(
    student: Student,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    machine: Machine,
    identity: Mapping[str, Any],
    resume: Resume = "auto",
    unsettled: Collection[str] = (),
) -> None:
    """Raise `Refused` for whatever `fit` would refuse of the same words before its first step; nothing changes.

    `unsettled` names what of the identity is not known yet.
    """
    machine.rows(config.batch_size, config.accumulate)
    build_optimizer(config.optimizer, trained(student))
    refuse_missing(config.tracking)
    checkpoints = Checkpoints(folder / "checkpoints", identity_of(config, objective, identity), config.keep)
    checkpoints.refuse_others(resume, unsettled)
    checkpoints.refuse_small_disk(checkpoint_bytes(student))


def fetch_checkpoint(
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    identity: Mapping[str, Any],
    resume: Resume,
    elsewhere: Elsewhere,
) -> None:
    """Bring the checkpoint that is kept elsewhere, where none is whole here; `Refused` when it is another run's."""
    checkpoints = Checkpoints(folder / "checkpoints", identity_of(config, objective, identity), config.keep)
    checkpoints.fetch(elsewhere, resume)


def claimed_by_main(folder: Path, machine: Machine) -> AbstractContextManager[None]:
    """The run folder, claimed by the main process for all of a run's processes; see `claimed`."""
    return claimed(folder, PURPOSE) if machine.is_main else nullcontext()


def identity_of(config: TrainConfig, objective: Objective, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    train = config.model_dump(mode="json", exclude=FREE_TO_CHANGE | ARITHMETIC)
    return {**identity, "train": train, "objective": objective.config.model_dump(mode="json")}


def trained(student: Student) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
