"""The loop of distillation and of fine-tuning: from wherever the run was left to its last sample."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from stages.train.hooks import Hooks
from stages.train.interrupt import Interruption
from stages.train.journal import Journal
from stages.train.judge import Judge, Nobody
from stages.train.machine import Machine
from stages.train.mishaps import Mishaps
from stages.train.objective import Objective
from stages.train.optim import build_optimizer, learning_rate
from stages.train.penalty import Penalty
from stages.train.start import ARITHMETIC, identity_of, trained
from stages.train.state import TrainingState
from stages.train.step import Stepper
from stages.train.updates import UpdateRatios

__all__ = ["Batches", "TrainConfig", "fit"]

Batches: TypeAlias = Callable[[int], Iterator[Batch]]
"""This process's rows of each batch from this sample on; what they hold depends on the number alone."""

LAYOUT = {"gradient_checkpointing", "compile", "channels_last"}


def fit(
    student: Student,
    objective: Objective,
    batches: Batches,
    uncond: Float[Tensor, "1 l d"],
    config: TrainConfig,
    folder: Path,
    *,
    machine: Machine,
    identity: Mapping[str, Any],
    hooks: Hooks | None = None,
    judge: Judge | None = None,
    samples_per_epoch: int | None = None,
    groups: Sequence[str] = (),
    resume: Resume = "auto",
) -> Student:
    """Train the student up to `max_samples` and hand it back wearing its averaged weights; a hook may end it before.

    `identity` holds what the weights depend on beyond `config` and the objective (the recipe's fingerprint, say), as
    JSON values; `groups` names those of the batches' rows.
    A run that was left at any sample goes on to the very bits of one that was not, if as many processes go on.
    """
    # What a step changes, and where the run was left
    hooks = hooks or Hooks()
    state = _state(student, objective, config, folder, machine, judge or Nobody())
    checkpoints = Checkpoints(folder / "checkpoints", identity_of(config, objective, identity), config.keep)
    taken = machine.on_main(checkpoints.restore, state, resume, hooks.elsewhere)
    if taken is not None and not machine.is_main:
        state.read(taken, int(taken.name))

    # The data from there on
    machine.rows(config.batch_size, config.accumulate)
    ended = machine.on_main(_ended, state, config, hooks)
    if not ended:
        machine.on_main(checkpoints.refuse_small_disk, state.bytes())
    stream = iter([] if ended else batches(state.samples))
    first = next(stream, None)

    # Nothing is refused any more
    machine.on_main(hooks.begin)
    if taken is not None:
        state.mishaps.forget_after(state.samples)
        machine.on_main(_show, state, student, hooks)
    if ended:
        machine.say(f"{folder}: {ended}")
        return _worn_for_good(state, student)
    if taken is not None and first is not None:
        machine.say(_resumed(taken, state, config, samples_per_epoch, first.keys[0]))

    # The steps
    step = Stepper(state, objective.to(machine.device), uncond.to(machine.device), config, machine)
    updates = UpdateRatios(trained(student))
    facts = identity_of(config, objective, identity)
    with (
        Journal(
            folder, state.samples, config.samples, objective.blocks, machine, config.tracking, facts, groups
        ) as journal,
        Interruption(machine.is_main) as interruption,
    ):
        waiting = time.perf_counter()
        for batch in chain([first] if first is not None else [], stream):
            before, after = state.samples, state.samples + config.batch_size
            over = after >= config.max_samples
            kept = over or _due(before, after, config.checkpoint_every_samples)
            told = kept or _due(before, after, config.journal_every_samples)
            if told and machine.is_main:
                updates.remember()
            made = step(batch, time.perf_counter() - waiting)
            journal.add(made, state.samples)
            signal = machine.most(interruption.number)

            if told and not signal:
                _tell(journal, state, updates, hooks, machine)
            if kept or signal:
                score = None if signal else machine.on_main(_validated, state, student, hooks, journal)
                machine.on_main(_keep, checkpoints, state, score, hooks)
                if signal:  # after the checkpoint: where the terminal is closed nothing can be printed
                    _tell(journal, state, updates, hooks, machine)
                if signal and not over:
                    _leave(signal, state.samples, folder, machine)
                machine.on_main(_show, state, student, hooks)
                journal.pause()
                if not over and (ended := machine.on_main(_ended, state, config, hooks)):
                    machine.say(f"{folder}: {ended}")
                    over = True
            if over:
                break
            waiting = time.perf_counter()
        else:
            raise Refused(f"data: ended after {state.samples} samples of {config.max_samples} - lower max_samples")

    # The end
    machine.release(step.model)
    return _worn_for_good(state, student)


def _state(
    student: Student, objective: Objective, config: TrainConfig, folder: Path, machine: Machine, judge: Judge
) -> TrainingState:
    """All that a step changes, at the beginning of a run."""
    student = student.to(machine.device).train()
    arithmetic = config.model_dump(include=ARITHMETIC)
    if any(arithmetic[name] for name in LAYOUT):
        student.lay_out(**{name: arithmetic[name] for name in LAYOUT})
    return TrainingState(
        student,
        Ema(student),
        build_optimizer(config.optimizer, trained(student), machine),
        Penalty(objective.config),
        judge,
        Mishaps(folder / "mishaps.jsonl" if machine.is_main else None, config.spike_sigmas),
        machine.scaler,
        {"processes": machine.world, **arithmetic},
    )


def _worn_for_good(state: TrainingState, student: Student) -> Student:
    state.ema.hand_over()
    if state.arithmetic["channels_last"]:
        student.lay_out(channels_last=False)
    return student.eval()


def _ended(state: TrainingState, config: TrainConfig, hooks: Hooks) -> str | None:
    """Why nothing is left to be done, if nothing is."""
    if state.samples >= config.max_samples:
        return f"all {config.max_samples} samples seen already"
    return hooks.enough(state.samples)


def _due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` was reached by this step."""
    return after // every > before // every


@torch.no_grad()
def _validated(state: TrainingState, student: Student, hooks: Hooks, journal: Journal) -> float | None:
    """The averaged student's score, if the caller measures one; the journal hears all that was found."""
    with state.ema.worn():
        found = hooks.validate(student.eval())
    student.train()
    if found is None:
        return None
    journal.note(state.samples, found.kind, found.told())
    return found.score


@torch.no_grad()
def _show(state: TrainingState, student: Student, hooks: Hooks) -> None:
    """Let the caller look at the averaged student."""
    with state.ema.worn():
        hooks.at_checkpoint(state.samples, student.eval())
    student.train()


def _keep(checkpoints: Checkpoints, state: TrainingState, score: float | None, hooks: Hooks) -> None:
    hooks.after_checkpoint(checkpoints.save(state, score))


def _tell(journal: Journal, state: TrainingState, updates: UpdateRatios, hooks: Hooks, machine: Machine) -> None:
    """One line of the journal, with all that anybody has to say."""
    if not machine.is_main:
        journal.write(state.samples)
        return
    more = {"update_ratio": updates.ratios(), **state.judge.told(), **state.mishaps.told(), **hooks.extra()}
    warning = hooks.warning()
    journal.write(state.samples, more, [warning] if warning else [])


def _resumed(
    taken: Path, state: TrainingState, config: TrainConfig, samples_per_epoch: int | None, next_key: str
) -> str:
    epoch = f", epoch {state.samples / samples_per_epoch:.2f}" if samples_per_epoch else ""
    rate = learning_rate(config.optimizer, state.samples, config.max_samples)
    seen = f"{state.samples} of {config.max_samples} samples"
    other = [
        f"{name} was {was}, is {state.arithmetic[name]}"
        for name, was in state.inherited.items()
        if was != state.arithmetic[name]
    ]
    rounding = f" - equal to rounding, not to the last bit: {'; '.join(other)}" if other else ""
    return f"{taken}: going on after {seen}{epoch}, learning rate {rate:.3g}, next {next_key}{rounding}"


def _leave(signal: int, samples: int, folder: Path, machine: Machine) -> NoReturn:
    machine.say(f"{folder}: left after {samples} samples, with a checkpoint - the same command goes on from there")
    raise SystemExit(128 + signal)
