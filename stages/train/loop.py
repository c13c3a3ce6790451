"""The loop of distillation and of fine-tuning: from wherever the run was left to its last sample."""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from configs.refusal import Refused
from shards.batch import Batch
from stages.nets.student import Student
from stages.train.checkpoint import Checkpoints, Resume
from stages.train.config import TrainConfig
from stages.train.ema import Ema
from stages.train.interrupt import Interruption
from stages.train.journal import Journal
from stages.train.judge import Judge, Nobody
from stages.train.objective import Objective
from stages.train.optim import build_optimizer, learning_rate
from stages.train.penalty import Penalty
from stages.train.state import TrainingState
from stages.train.step import Stepper
from stages.train.updates import UpdateRatios
from stages.train.validation import Validation

__all__ = ["Batches", "TrainConfig", "fit"]

Batches: TypeAlias = Callable[[int], Iterator[Batch]]
"""The batches from this sample on; what they hold depends on the number alone."""

FREE_TO_CHANGE = {"journal_every_samples", "checkpoint_every_samples", "keep", "tracking"}


def fit(
    student: Student,
    objective: Objective,
    batches: Batches,
    uncond: Float[Tensor, "1 l d"],
    config: TrainConfig,
    folder: Path,
    at_checkpoint: Callable[[int, Student], None],
    *,
    device: torch.device,
    identity: Mapping[str, Any],
    judge: Judge | None = None,
    samples_per_epoch: int | None = None,
    validation: Validation | None = None,
    resume: Resume = "auto",
) -> Student:
    """Train the student up to `max_samples` and hand it back wearing its averaged weights.

    `identity` holds what the weights depend on beyond `config` and the objective (the recipe's fingerprint, say), as
    JSON values.
    `at_checkpoint` sees the averaged student after each checkpoint, and again when a run goes on from one.
    A run that was left at any sample goes on to the very bits of one that was not.
    """
    # What a step changes, and where the run was left
    student = student.to(device).train()
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(config.optimizer, trained)
    state = TrainingState(student, Ema(student), optimizer, Penalty(objective.config), judge or Nobody())
    checkpoints = Checkpoints(folder / "checkpoints", _identity(config, objective, identity), config.keep)
    taken = checkpoints.restore(state, resume)
    if taken is not None:
        _show(state, student, at_checkpoint)

    # The data from there on
    if state.samples >= config.max_samples:
        print(f"{folder}: all {config.max_samples} samples seen already")
        state.ema.hand_over()
        return student.eval()
    checkpoints.refuse_small_disk(state)
    stream = iter(batches(state.samples))
    first = next(stream, None)
    if taken is not None and first is not None:
        print(_resumed(taken, state.samples, config, samples_per_epoch, first.keys[0]))

    # The steps
    step = Stepper(state, objective.to(device), uncond.to(device), config, device)
    updates, facts = UpdateRatios(trained), _identity(config, objective, identity)
    with (
        Journal(folder, state.samples, config.max_samples, objective.blocks, config.tracking, facts=facts) as journal,
        Interruption() as interruption,
    ):
        waiting = time.perf_counter()
        for batch in chain([first] if first is not None else [], stream):
            before = state.samples
            after = before + len(batch)
            told = _due(before, after, config.journal_every_samples)
            kept = after >= config.max_samples or _due(before, after, config.checkpoint_every_samples)
            if told or kept:
                updates.remember()
            journal.add(step(batch, time.perf_counter() - waiting))
            over = state.samples >= config.max_samples
            leave = interruption.signal is not None
            kept = kept or leave
            if told or kept:
                journal.write(state.samples, {"update_ratio": updates.ratios(), **state.judge.told()})

            measured = validation is not None and not leave and validation.due(before, after, at_checkpoint=kept)
            if validation is not None and measured:
                _measure(state, student, validation, journal)
            if kept:
                checkpoints.save(state)
                if leave and not over:
                    _leave(interruption, state.samples, folder)
                _show(state, student, at_checkpoint)
            if kept or measured:
                journal.pause()
            if over:
                break
            waiting = time.perf_counter()
        else:
            raise Refused(f"data: ended after {state.samples} samples of {config.max_samples} - lower max_samples")

    # The end
    state.ema.hand_over()
    return student.eval()


def _due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` was reached by this step."""
    return after // every > before // every


@torch.no_grad()
def _show(state: TrainingState, student: Student, at_checkpoint: Callable[[int, Student], None]) -> None:
    """Let the caller look at the averaged student."""
    with state.ema.worn():
        at_checkpoint(state.samples, student.eval())
    student.train()


@torch.no_grad()
def _measure(state: TrainingState, student: Student, validation: Validation, journal: Journal) -> float:
    """The averaged student's error at held-out states; the journal hears all that was found."""
    with state.ema.worn():
        found = validation(student.eval())
    student.train()
    journal.note(state.samples, "validation", found.told())
    return found.score


def _identity(config: TrainConfig, objective: Objective, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    train = config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    return {**identity, "train": train, "objective": objective.config.model_dump(mode="json")}


def _resumed(taken: Path, samples: int, config: TrainConfig, samples_per_epoch: int | None, next_key: str) -> str:
    epoch = f", epoch {samples / samples_per_epoch:.2f}" if samples_per_epoch else ""
    rate = learning_rate(config.optimizer, samples, config.max_samples)
    seen = f"{samples} of {config.max_samples} samples"
    return f"{taken}: going on after {seen}{epoch}, learning rate {rate:.3g}, next {next_key}"


def _leave(interruption: Interruption, samples: int, folder: Path) -> NoReturn:
    number = interruption.signal
    print(f"{folder}: left after {samples} samples, with a checkpoint - the same command goes on from there")
    raise SystemExit(128 + int(number) if number is not None else 1)
