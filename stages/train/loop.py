"""The training loop of distillation and fine-tuning: from the last checkpoint to the last sample."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from configs.values import PictureSize
from shards.batch import Batch
from stages.nets.student import Student
from stages.system.refusal import Refused
from stages.system.signals import Interruption
from stages.system.storage.lease import loss_of, refuse_loss
from stages.train.block_weighter import BlockWeighter
from stages.train.checkpoint import CheckpointFetcher, Checkpoints, Resume
from stages.train.ema import Ema
from stages.train.journal import Journal
from stages.train.objective import BlockTermWeight, Objective
from stages.train.optim import UpdateRatios, build_optimizer, learning_rate
from stages.train.runtime import Runtime
from stages.train.setup import (
    ARITHMETIC_FIELDS,
    TrainConfig,
    refuse_uneven_batches,
    run_checkpoints,
    trainable_parameters,
)
from stages.train.state import Anomalies, TrainingState
from stages.train.step import Targets, TrainingStep

Batches: TypeAlias = Callable[[int], Iterator[Batch]]
"""This process's rows of each batch from this sample on; they depend on the sample number alone."""
LAYOUT_FIELDS = {"gradient_checkpointing", "compile", "channels_last"}


class CheckpointResult(Protocol):
    """The metrics of a student at a checkpoint."""

    @property
    def kind(self) -> str:
        """Kind of the journal's line."""

    @property
    def score(self) -> float | None:
        """The best checkpoint has the least; None excludes this one."""

    def metrics(self) -> Mapping[str, Any]:
        """Content of the journal's line."""


@dataclass(frozen=True)
class Hooks:
    """Functions of a command, called during training on the main process alone, while the others wait."""

    validate: Callable[[Student], CheckpointResult | None] = lambda _student: None
    """Before each checkpoint, with the averaged student."""
    on_checkpoint_saved: Callable[[Path], None] = lambda _folder: None
    """After each checkpoint, with its folder."""
    on_checkpoint: Callable[[int, Student], None] = lambda _samples, _student: None
    """After each checkpoint with the averaged student, and again when a run resumes from one."""
    stop_reason: Callable[[int], str | None] = lambda _samples: None
    """After each checkpoint and at a resume, with the samples seen: why training ends early, if it does."""
    extra_metrics: Callable[[], Mapping[str, Any]] = dict
    """More for each line of the journal: numbers or mappings of numbers by name."""
    warning: Callable[[], str | None] = lambda: None
    """Shown at each line of the journal, unless None."""
    fetch_checkpoint: CheckpointFetcher | None = None
    """Called when no checkpoint of this folder is whole."""
    on_start: Callable[[], None] = lambda: None
    """Before the first step, when nothing can be refused any more: saves the run's settings."""


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
    last_sample: int | None = None,
    groups: Sequence[str] = (),
    sizes: Sequence[PictureSize] = (),
    resume: Resume = "auto",
    targets: Targets | None = None,
) -> Student:
    """Train the student up to `max_samples`, or to a hook's `stop_reason`, and return it with its averaged weights.

    `identity` holds what the weights depend on beyond `config` and the objective (the recipe's fingerprint, say), as
    JSON values; `groups` names the groups of the batches' rows, `sizes` are their picture sizes.
    `last_sample` is the end of the first batch that reaches `max_samples`, by default of batches of `batch_size` rows.
    A run that was interrupted at any sample ends with the same bits as one that was not, on as many processes.
    """
    # What a step changes, and the checkpoint to resume from
    hooks = hooks or Hooks()
    block_weighter = block_weighter or BlockWeighter(objective.static_lambdas(runtime.device))
    state = initial_state(student, objective, config, folder, runtime, block_weighter)
    checkpoints = run_checkpoints(folder, config, objective, identity)
    checkpoint = runtime.on_main(checkpoints.restore, state, resume, hooks.fetch_checkpoint)
    if checkpoint is not None and not runtime.is_main:
        state.read(checkpoint, int(checkpoint.name))

    # The data from there on
    refuse_uneven_batches(config, runtime, sizes)
    last_sample = last_sample or -(-config.max_samples // config.batch_size) * config.batch_size
    reason = runtime.on_main(_stop_reason, state, config, hooks)
    if not reason:
        runtime.on_main(checkpoints.refuse_small_disk, state.size_bytes())
    stream = iter([] if reason else batches(state.samples))
    first = next(stream, None)

    # Nothing is refused any more
    runtime.on_main(hooks.on_start)
    if checkpoint is not None:
        state.anomalies.truncate_after(state.samples)
        runtime.on_main(_run_on_checkpoint, state, student, hooks)
    if reason:
        runtime.print_on_main(f"{folder}: {reason}")
        return _finalize_student(state, student)
    if checkpoint is not None and first is not None:
        runtime.print_on_main(_resume_message(checkpoint, state, config, samples_per_epoch, first.keys[0]))

    # The steps
    step = TrainingStep(state, objective.to(runtime.device), uncond.to(runtime.device), config, runtime, targets)
    updates = UpdateRatios(trainable_parameters(student))
    run_config = checkpoints.identity
    with (
        Journal(
            folder,
            state.samples,
            last_sample,
            objective.blocks,
            runtime,
            config.tracking,
            run_config,
            groups,
            sizes if len(sizes) > 1 else (),
            two_branches=not student.embeds_guidance,
        ) as journal,
        Interruption(runtime.is_main) as interruption,
    ):
        waiting_since = time.perf_counter()
        for batch in chain([first] if first is not None else [], stream):
            before, after = state.samples, state.samples + len(batch) * runtime.world
            is_last = after >= config.max_samples
            saves = is_last or is_due(before, after, config.checkpoint_every_samples)
            writes_line = saves or is_due(before, after, config.journal_every_samples)
            if writes_line and runtime.is_main:
                updates.record_weights()
            result = step(batch, time.perf_counter() - waiting_since)
            journal.add(result, state.samples)
            signal = runtime.all_reduce_max(interruption.signal_number or int(loss_of(folder) is not None))
            if signal:  # no checkpoint beside those of the machine that took the run over
                runtime.on_main(refuse_loss, folder)

            if writes_line and not signal:
                _write_journal_line(journal, state, updates, hooks, runtime)
            if saves or signal:
                with state.gathered():
                    runtime.on_main(_save_checkpoint, checkpoints, state, student, hooks, journal, validates=not signal)
                if signal:  # after the checkpoint: where the terminal is closed nothing can be printed
                    _write_journal_line(journal, state, updates, hooks, runtime)
                if signal and not is_last:
                    _exit_on_signal(signal, state.samples, folder, runtime)
                runtime.on_main(_run_on_checkpoint, state, student, hooks)
                journal.exclude_pause()
                if not is_last and (reason := runtime.on_main(_stop_reason, state, config, hooks)):
                    runtime.print_on_main(f"{folder}: {reason}")
                    is_last = True
            if is_last:
                break
            waiting_since = time.perf_counter()
        else:
            raise Refused(f"data: ended after {state.samples} samples of {config.max_samples} - lower max_samples")

    # The end
    runtime.release(step.model)
    return _finalize_student(state, student)


def initial_state(
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
        build_optimizer(config.optimizer, trainable_parameters(student), runtime, config.shard_moments),
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
    """Why nothing is left to train, if so."""
    if state.samples >= config.max_samples:
        return f"all {config.max_samples} samples seen already"
    return hooks.stop_reason(state.samples)


def is_due(before: int, after: int, every: int) -> bool:
    """Whether this step reached a multiple of `every`."""
    return after // every > before // every


@contextmanager
def _averaged(state: TrainingState, student: Student) -> Iterator[Student]:
    """The student with its averaged weights, in eval mode and without gradients."""
    with state.ema.swapped_in(), torch.no_grad():
        yield student.eval()
    student.train()


def _run_on_checkpoint(state: TrainingState, student: Student, hooks: Hooks) -> None:
    with _averaged(state, student) as averaged:
        hooks.on_checkpoint(state.samples, averaged)


def _save_checkpoint(
    checkpoints: Checkpoints, state: TrainingState, student: Student, hooks: Hooks, journal: Journal, validates: bool
) -> None:
    """Save a checkpoint with its score; validated first, with a line in the journal, unless a signal ends the run."""
    result = None
    if validates:
        with _averaged(state, student) as averaged:
            result = hooks.validate(averaged)
    if result is not None:
        journal.write_event(state.samples, result.kind, result.metrics())
    hooks.on_checkpoint_saved(checkpoints.save(state, result.score if result is not None else None))


def _write_journal_line(
    journal: Journal, state: TrainingState, update_ratios: UpdateRatios, hooks: Hooks, runtime: Runtime
) -> None:
    """One line of the journal with the metrics of all parts; those of the main process."""
    if not runtime.is_main:
        journal.write(state.samples)
        return
    metrics = {
        "update_ratio": update_ratios.ratios(),
        **state.block_weighter.metrics(),
        **state.anomalies.metrics(),
        **hooks.extra_metrics(),
    }
    warning = hooks.warning()
    journal.write(state.samples, metrics, [warning] if warning else [])


def _resume_message(
    checkpoint: Path, state: TrainingState, config: TrainConfig, samples_per_epoch: int | None, next_key: str
) -> str:
    epoch = f", epoch {state.samples / samples_per_epoch:.2f}" if samples_per_epoch else ""
    rate = learning_rate(config.optimizer, state.samples, config.max_samples)
    progress = f"{state.samples} of {config.max_samples} samples"
    changes = [
        f"{name} was {was}, is {state.arithmetic[name]}"
        for name, was in state.previous_arithmetic.items()
        if was != state.arithmetic[name]
    ]
    rounding = f" - equal to rounding, not to the last bit: {'; '.join(changes)}" if changes else ""
    return f"{checkpoint}: going on after {progress}{epoch}, learning rate {rate:.3g}, next {next_key}{rounding}"


def _exit_on_signal(signal: int, samples: int, folder: Path, runtime: Runtime) -> NoReturn:
    runtime.print_on_main(
        f"{folder}: left after {samples} samples, with a checkpoint - the same command goes on from there"
    )
    raise SystemExit(128 + signal)
