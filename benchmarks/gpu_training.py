"""Stage two on the card: the time and memory of a step under each overlay, beside other loops and other settings."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import memory, training_peer
from benchmarks.gpu_cache import compiler_of
from benchmarks.gpu_card import GIB, now, peak_gib, reset_peak, synchronize
from benchmarks.gpu_report import Budget, BudgetUsed, RecordFigures
from benchmarks.gpu_world import World, new_unet
from shards.batch import Batch
from stages.cached_training import CachedTraining, TrainingData
from stages.distill import Config
from stages.hub.uploader import make_uploader
from stages.nets.graft import graft_time_embedding
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.system.refusal import Refused, in_one_line
from stages.train.block_weighter import DAVID_FOLDER
from stages.train.checkpoint import Checkpoints
from stages.train.loop import Hooks
from stages.train.runtime import Runtime
from stages.train.setup import claim_on_main
from stages.train.step import TrainingStep

WARM_STEPS, STEPS = 3, 12
DRY_WARM_STEPS, DRY_STEPS = 1, 1
EIGHT_BITS = "adamw_8bit"
Batches = Callable[[Iterator[Batch]], Iterator[Batch]]


class Measured(Exception):
    """Enough steps are measured: the loop is left, without a checkpoint."""


@dataclass
class StepTimes:
    """The steps of one loop, on this process's clock; the device is waited for only before the first and after the last
    counted step, so that reading and computing overlap as ever."""

    warm: int
    begins: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    end: float = 0.0

    @property
    def counted(self) -> int:
        """Steps after those that warm up."""
        return max(0, len(self.begins) - self.warm)

    @property
    def seconds(self) -> float:
        """Of one step, the mean."""
        return (self.end - self.begins[self.warm]) / self.counted

    def figures(self) -> dict[str, Any]:
        """Of a report."""
        return {
            "step_seconds": self.seconds,
            "steps": self.counted,
            "data_wait_share": sum(self.waits[self.warm :]) / (self.end - self.begins[self.warm]),
            "first_step_seconds": self.begins[1] - self.begins[0] if len(self.begins) > 1 else None,
        }


@contextmanager
def timed_steps(times: StepTimes, steps: int, budget: Budget, device: torch.device) -> Iterator[None]:
    """Time the steps of the loop in this block, and leave it after `steps` counted ones or when the budget is used."""
    call = TrainingStep.__call__

    def timed(step: TrainingStep, batch: Batch, data_wait_seconds: float) -> Any:
        if len(times.begins) == times.warm:
            synchronize(device)
        # The wait came before this call, and belongs to the step.
        times.begins.append(time.perf_counter() - data_wait_seconds)
        times.waits.append(data_wait_seconds)
        result = call(step, batch, data_wait_seconds)
        if times.counted >= steps or (budget.left <= 0 and times.counted):
            times.end = now(device)
            raise Measured
        budget.check("the first counted step")
        return result

    with ExitStack() as patches:
        patches.enter_context(patch.object(TrainingStep, "__call__", timed))
        # None is written: the loop is left before the first one is due.
        patches.enter_context(patch.object(Checkpoints, "refuse_small_disk"))
        try:
            yield
        except Measured:
            return
    raise Refused("training ended before it was measured")


def step_times(
    world: World, config: Config, budget: Budget, changed: Batches | None = None
) -> tuple[StepTimes, dict[str, Any]]:
    """The steps of `sollune distill` with this configuration on the small cache, and what tensors took meanwhile.

    The memory is that of the teacher, of the student and of its training, as in the command. `changed` stands between
    reader and loop.
    """
    warm, steps = (DRY_WARM_STEPS, DRY_STEPS) if world.dry else (WARM_STEPS, STEPS)
    teacher, runtime = world.teacher, world.runtime(config.train.precision)
    uncond = teacher.uncond  # encoded once, before anything is measured
    world.release()
    before = reset_peak(world.device)
    data = TrainingData.open(world.cache, config.train, runtime, teacher.components.native_size)
    if changed is not None:
        read, change = data.reader.batches, changed
        data.reader.batches = lambda start=0, order=None: change(read(start, order))  # type: ignore[method-assign]
    student = Student.from_teacher(teacher.components.unet)
    graft_time_embedding(student.unet, teacher.bridge)
    folder = world.fresh_folder("distill", kept=DAVID_FOLDER)  # fitted once
    times = StepTimes(warm)
    with compiler_of(world), timed_steps(times, steps, budget, uncond.device):
        train(data, config, folder, student, teacher, runtime)
    peak = peak_gib(world.device)
    return times, {"peak_gib": peak, "gib_before": before}


def train(
    data: TrainingData, config: Config, folder: Path, student: Student, teacher: Teacher, runtime: Runtime
) -> None:
    """The training of `sollune distill`, without its validation and pictures."""
    training = CachedTraining.prepare(data, config, folder, student, {"benchmark": "gpu"}, runtime)
    with make_uploader(config.hub, folder, runtime.is_main) as uploader, claim_on_main(folder, runtime):
        training.train(teacher, Hooks(), uploader, runtime)


def forecast_gib(world: World, config: Config) -> dict[str, float]:
    """The computed memory of this configuration, by part (`benchmarks.memory`)."""
    parts = world.teacher.components
    size, length = parts.native_size, parts.tokenizer.model_max_length
    networks = memory.Networks(
        lambda: type(parts.unet).from_config(parts.unet.config),
        lambda: type(parts.vae).from_config(parts.vae.config),
        lambda: type(parts.text_encoder)(parts.text_encoder.config),
        (length, parts.unet.config["cross_attention_dim"]),
    )
    use = memory.memory_use(config.train, size, networks)
    return {**{name: value / GIB for name, value in vars(use).items()}, "total": use.total / GIB}


def overlay_80gb(world: World, budget: Budget, record: RecordFigures) -> None:
    """configs/cards/80gb.yaml."""
    measure_overlay(world, budget, record, "80gb")


def overlay_40gb(world: World, budget: Budget, record: RecordFigures) -> None:
    """configs/cards/40gb.yaml."""
    measure_overlay(world, budget, record, "40gb")


def overlay_24gb(world: World, budget: Budget, record: RecordFigures) -> None:
    """configs/cards/24gb.yaml."""
    measure_overlay(world, budget, record, "24gb")


def measure_overlay(world: World, budget: Budget, record: RecordFigures, overlay: str) -> None:
    """The steps under an overlay; with plain AdamW where its own optimizer is not installed, which is recorded."""
    config = world.distill_config(overlay)
    try:
        measure_config(world, config, budget, record)
    except Refused as refusal:
        if config.train.optimizer.kind != EIGHT_BITS or "bitsandbytes" not in str(refusal):
            raise
        record({"in_place": f"adamw, because {refusal}"})
        config = world.distill_config(overlay, ["--train.optimizer.kind", "adamw"])
        measure_config(world, config, budget, record)


def measure_config(world: World, config: Config, budget: Budget, record: RecordFigures) -> None:
    """Step, wait and memory of one configuration, and the forecast of that memory."""
    times, memory_figures = step_times(world, config, budget)
    speed = {"states_per_second": config.train.batch_size / times.seconds}
    record({**times.figures(), **speed, **memory_figures, "settings": settings_of(config)})
    record({"forecast_gib": forecast_gib(world, config)})


def settings_of(config: Config) -> dict[str, Any]:
    """Those that a step's time depends on."""
    names = ("batch_size", "precision", "accumulate", "gradient_checkpointing", "compile", "channels_last")
    return {**{name: getattr(config.train, name) for name in names}, "optimizer": config.train.optimizer.kind}


def peers(world: World, budget: Budget, record: RecordFigures) -> None:
    """Ours from the cache, the same with a teacher in the loop, and diffusers' own loop; then ours again.

    All under the overlay of this card. The second of ours tells how far the card drifted in between.
    """
    config = world.distill_config(world.overlay)
    record({"overlay": world.overlay, "settings": settings_of(config)})
    share = budget.seconds / 4
    ours, _ = step_times(world, config, Budget(min(share, budget.left)))
    record({"ours_seconds": ours.seconds})

    budget.check("the loop with a teacher in it")
    online, _ = step_times(world, config, Budget(min(1.5 * share, budget.left)), teacher_in_loop(world))
    record({"online_seconds": online.seconds, "online_over_ours": online.seconds / ours.seconds})

    budget.check("diffusers' loop", 2 * WARM_STEPS * ours.seconds)
    steps = DRY_STEPS + 1 if world.dry else int(min(STEPS + 1, 0.5 * budget.left / ours.seconds))
    example = example_seconds(world, config, steps)
    record({"diffusers_seconds": example, "diffusers_over_ours": example / ours.seconds})

    budget.check("ours again")
    again, _ = step_times(world, config, Budget(budget.left))
    record({"ours_again_seconds": again.seconds, "drift": again.seconds / ours.seconds})


def teacher_in_loop(world: World) -> Batches:
    """Replaces what the cache holds by the predictions of a teacher, in the precision in which caches are made fast."""
    dtype = torch.float32 if world.dry else torch.float16
    teacher = Teacher(world.fresh_teacher().components, "hold", dtype)
    uncond = teacher.uncond

    def predicted(batch: Batch) -> Batch:
        moved = batch.to(world.device, torch.float32)
        output = teacher.predict(moved.x_s, moved.s, moved.k, moved.cond, uncond)
        return replace(moved, v_cond=output.v_cond, v_uncond=output.v_uncond, features=output.features)

    return lambda batches: map(predicted, batches)


def example_seconds(world: World, config: Config, steps: int) -> float:
    """The mean step of diffusers' training example with as many rows, in the same precision, after the first two."""
    teacher, settings = world.teacher, config.train
    unet = new_unet(teacher.components.unet, world.device)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    rows, shape = 2 * settings.batch_size, teacher.components.latent_shape()
    cond = teacher.uncond.detach().clone().cpu()
    precision = world.runtime(settings.precision).accelerator.mixed_precision

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.randn(rows, *shape), cond.expand(rows, -1, -1)

    seconds = training_peer.step_seconds(
        unet,
        batches(),
        steps,
        world.device,
        lambda: now(world.device),
        precision=precision,
        accumulate=settings.accumulate,
    )
    counted = seconds[min(2, len(seconds) - 1) :]
    return sum(counted) / len(counted)


ADAMW, MUON = ("--train.optimizer.kind", "adamw"), ("--train.optimizer.kind", "muon")
CHANNELS_LAST = ("--train.channels-last", "true")
VARIANTS = {"plain": ADAMW, "muon": MUON, "channels_last": ADAMW + CHANNELS_LAST, "both": MUON + CHANNELS_LAST}
COMPILED = {"plain": ADAMW, "compile": (*ADAMW, "--train.compile", "true")}


def variants(world: World, budget: Budget, record: RecordFigures) -> None:
    """Muon against AdamW, and channels_last, under the overlay of this card."""
    compare(world, budget, record, VARIANTS)


def compiled(world: World, budget: Budget, record: RecordFigures) -> None:
    """torch.compile against eager, in one run."""
    compare(world, budget, record, COMPILED)


def compare(world: World, budget: Budget, record: RecordFigures, options: Mapping[str, Sequence[str]]) -> None:
    """Steps with each of these options, and their ratios to the plain ones; one that finds no memory stops no other."""
    plain: float | None = None
    record({"overlay": world.overlay})
    for number, (name, own) in enumerate(options.items()):
        budget.check(name)
        share = Budget(budget.left / (len(options) - number))
        try:
            times, figures = step_times(world, world.distill_config(world.overlay, own), share)
        except (BudgetUsed, torch.OutOfMemoryError) as error:
            record({name: {"left_out": in_one_line(error)}})
            continue
        plain = times.seconds if name == "plain" else plain
        ratio = {"over_plain": times.seconds / plain} if plain else {}
        record({name: {**times.figures(), **figures, **ratio}})
