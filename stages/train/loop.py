"""What a story wants to do or to say while its student is trained.

The loop of distillation and of fine-tuning: from wherever the run was left to its last sample.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from shards.batch import Batch
from stages.nets.student import Student
from stages.system.refusal import Refused
from stages.system.signals import Interruption
from stages.train.assessor import BlockWeighter, StaticWeights
from stages.train.checkpoint import CheckpointFetcher, Checkpoints, Resume
from stages.train.ema import Ema
from stages.train.journal import Journal
from stages.train.objective import BlockTermWeight, Objective
from stages.train.optim import UpdateRatios, build_optimizer, learning_rate
from stages.train.runtime import Runtime
from stages.train.setup import ARITHMETIC_FIELDS, TrainConfig, run_identity, trainable_parameters
from stages.train.state import Anomalies, TrainingState
from stages.train.step import TrainingStep


class CheckpointResult(Protocol):
    """What was found of a student at a checkpoint."""

    @property
    def kind(self) -> str:
        """What the journal calls it."""
        ...

    @property
    def score(self) -> float | None:
        """What the best checkpoint has least of; None when this one cannot be it."""
        ...

    def metrics(self) -> Mapping[str, Any]:
        """What the journal writes."""
        ...


def _skip_checkpoint(_samples: int, _student: Student) -> None:
    return None


def _skip_validation(_student: Student) -> None:
    return None


def _never_stop(_samples: int) -> None:
    return None


def _skip_start() -> None:
    return None


def _no_warning() -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """Called on the main process alone, while the others wait."""

    validate: Callable[[Student], CheckpointResult | None] = _skip_validation
    """Before each checkpoint, with the averaged student: what was measured of it, if anything was."""
    on_checkpoint_saved: Callable[[Path], None] = lambda _folder: None
    """With the folder of each checkpoint that was written."""
    on_checkpoint: Callable[[int, Student], None] = _skip_checkpoint
    """After each checkpoint with the averaged student, and again when a run goes on from one."""
    stop_reason: Callable[[int], str | None] = _never_stop
    """After each checkpoint, and when a run goes on, with the samples seen: why training is over, if it is."""
    extra_metrics: Callable[[], Mapping[str, Any]] = dict
    """More for each line of the journal: names, and numbers or mappings of numbers."""
    warning: Callable[[], str | None] = _no_warning
    """Shown at each line of the journal as long as there is one."""
    fetch_checkpoint: CheckpointFetcher | None = None
    """Asked when no checkpoint of this folder is whole."""
    on_start: Callable[[], None] = _skip_start
    """Once nothing can be refused any more, before the first step: what the run leaves of its settings."""


__all__ = ["Batches", "TrainConfig", "fit"]

Batches: TypeAlias = Callable[[int], Iterator[Batch]]
"""This process's rows of each batch from this sample on; what they hold depends on the number alone."""

LAYOUT_FIELDS = {"gradient_checkpointing", "compile", "channels_last"}


def fit(
    student: Student,
    objective: Objective,
    batches: Batches,
    uncond: Float[Tensor, "1 l d"],
    config: TrainConfig,
    folder: Path,
    *,
    runtime: Runtime,
    identity: Mapping[str, Any],
    hooks: Hooks | None = None,
    block_weighter: BlockWeighter | None = None,
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
    state = _initial_state(student, objective, config, folder, runtime, block_weighter or StaticWeights())
    checkpoints = Checkpoints(folder / "checkpoints", run_identity(config, objective, identity), config.keep)
    taken = runtime.on_main(checkpoints.restore, state, resume, hooks.fetch_checkpoint)
    if taken is not None and not runtime.is_main:
        state.read(taken, int(taken.name))

    # The data from there on
    runtime.local_batch_size(config.batch_size, config.accumulate)
    ended = runtime.on_main(_stop_reason, state, config, hooks)
    if not ended:
        runtime.on_main(checkpoints.refuse_small_disk, state.size_bytes())
    stream = iter([] if ended else batches(state.samples))
    first = next(stream, None)

    # Nothing is refused any more
    runtime.on_main(hooks.on_start)
    if taken is not None:
        state.anomalies.truncate_after(state.samples)
        runtime.on_main(_run_on_checkpoint, state, student, hooks)
    if ended:
        runtime.print_on_main(f"{folder}: {ended}")
        return _finalize_student(state, student)
    if taken is not None and first is not None:
        runtime.print_on_main(_resume_message(taken, state, config, samples_per_epoch, first.keys[0]))

    # The steps
    step = TrainingStep(state, objective.to(runtime.device), uncond.to(runtime.device), config, runtime)
    updates = UpdateRatios(trainable_parameters(student))
    facts = run_identity(config, objective, identity)
    with (
        Journal(
            folder, state.samples, config.samples, objective.blocks, runtime, config.tracking, facts, groups
        ) as journal,
        Interruption(runtime.is_main) as interruption,
    ):
        waiting = time.perf_counter()
        for batch in chain([first] if first is not None else [], stream):
            before, after = state.samples, state.samples + config.batch_size
            over = after >= config.max_samples
            kept = over or _is_due(before, after, config.checkpoint_every_samples)
            told = kept or _is_due(before, after, config.journal_every_samples)
            if told and runtime.is_main:
                updates.record_weights()
            made = step(batch, time.perf_counter() - waiting)
            journal.add(made, state.samples)
            signal = runtime.all_reduce_max(interruption.signal_number)

            if told and not signal:
                _write_journal_line(journal, state, updates, hooks, runtime)
            if kept or signal:
                score = None if signal else runtime.on_main(_validate, state, student, hooks, journal)
                runtime.on_main(_save_checkpoint, checkpoints, state, score, hooks)
                if signal:  # after the checkpoint: where the terminal is closed nothing can be printed
                    _write_journal_line(journal, state, updates, hooks, runtime)
                if signal and not over:
                    _exit_on_signal(signal, state.samples, folder, runtime)
                runtime.on_main(_run_on_checkpoint, state, student, hooks)
                journal.exclude_pause()
                if not over and (ended := runtime.on_main(_stop_reason, state, config, hooks)):
                    runtime.print_on_main(f"{folder}: {ended}")
                    over = True
            if over:
                break
            waiting = time.perf_counter()
        else:
            raise Refused(f"data: ended after {state.samples} samples of {config.max_samples} - lower max_samples")

    # The end
    runtime.release(step.model)
    return _finalize_student(state, student)


def _initial_state(
    student: Student,
    objective: Objective,
    config: TrainConfig,
    folder: Path,
    runtime: Runtime,
    block_weighter: BlockWeighter,
) -> TrainingState:
    """All that a step changes, at the beginning of a run."""
    student = student.to(runtime.device).train()
    arithmetic = config.model_dump(include=ARITHMETIC_FIELDS)
    if any(arithmetic[name] for name in LAYOUT_FIELDS):
        student.configure_compute(**{name: arithmetic[name] for name in LAYOUT_FIELDS})
    return TrainingState(
        student,
        Ema(student),
        build_optimizer(config.optimizer, trainable_parameters(student), runtime),
        BlockTermWeight(objective.config),
        block_weighter,
        Anomalies(folder / "mishaps.jsonl" if runtime.is_main else None, config.spike_sigmas),
        runtime.scaler,
        {"processes": runtime.world, **arithmetic},
    )


def _finalize_student(state: TrainingState, student: Student) -> Student:
    state.ema.copy_to_module()
    if state.arithmetic["channels_last"]:
        student.configure_compute(channels_last=False)
    return student.eval()


def _stop_reason(state: TrainingState, config: TrainConfig, hooks: Hooks) -> str | None:
    """Why nothing is left to be done, if nothing is."""
    if state.samples >= config.max_samples:
        return f"all {config.max_samples} samples seen already"
    return hooks.stop_reason(state.samples)


def _is_due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` was reached by this step."""
    return after // every > before // every


@torch.no_grad()
def _validate(state: TrainingState, student: Student, hooks: Hooks, journal: Journal) -> float | None:
    """The averaged student's score, if the caller measures one; the journal hears all that was found."""
    with state.ema.swapped_in():
        found = hooks.validate(student.eval())
    student.train()
    if found is None:
        return None
    journal.write_event(state.samples, found.kind, found.metrics())
    return found.score


@torch.no_grad()
def _run_on_checkpoint(state: TrainingState, student: Student, hooks: Hooks) -> None:
    """Let the caller look at the averaged student."""
    with state.ema.swapped_in():
        hooks.on_checkpoint(state.samples, student.eval())
    student.train()


def _save_checkpoint(checkpoints: Checkpoints, state: TrainingState, score: float | None, hooks: Hooks) -> None:
    hooks.on_checkpoint_saved(checkpoints.save(state, score))


def _write_journal_line(
    journal: Journal, state: TrainingState, update_ratios: UpdateRatios, hooks: Hooks, runtime: Runtime
) -> None:
    """One line of the journal, with all that anybody has to say."""
    if not runtime.is_main:
        journal.write(state.samples)
        return
    more = {
        "update_ratio": update_ratios.ratios(),
        **state.block_weighter.metrics(),
        **state.anomalies.metrics(),
        **hooks.extra_metrics(),
    }
    warning = hooks.warning()
    journal.write(state.samples, more, [warning] if warning else [])


def _resume_message(
    checkpoint: Path, state: TrainingState, config: TrainConfig, samples_per_epoch: int | None, next_key: str
) -> str:
    epoch = f", epoch {state.samples / samples_per_epoch:.2f}" if samples_per_epoch else ""
    rate = learning_rate(config.optimizer, state.samples, config.max_samples)
    seen = f"{state.samples} of {config.max_samples} samples"
    other = [
        f"{name} was {was}, is {state.arithmetic[name]}"
        for name, was in state.previous_arithmetic.items()
        if was != state.arithmetic[name]
    ]
    rounding = f" - equal to rounding, not to the last bit: {'; '.join(other)}" if other else ""
    return f"{checkpoint}: going on after {seen}{epoch}, learning rate {rate:.3g}, next {next_key}{rounding}"


def _exit_on_signal(signal: int, samples: int, folder: Path, runtime: Runtime) -> NoReturn:
    runtime.print_on_main(
        f"{folder}: left after {samples} samples, with a checkpoint - the same command goes on from there"
    )
    raise SystemExit(128 + signal)
