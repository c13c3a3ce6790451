"""What a conversion will cost on this machine: counted operations, times a few of them measured here."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from configs.values import PictureSize
from shards.batch import Batch, collate
from stages.cache.fill import ShardTask, unfinished_tasks
from stages.cache.plan import blank_record, peak_memory
from stages.cache_teacher import CacheJob, record_bytes_by_size
from stages.convert.conversion import Conversion
from stages.convert.results import START_FILE, VERDICT_FILE
from stages.evaluate.paired import REFERENCE_FACTOR
from stages.export.verify_export import DEFAULT_OPTIONS, DTYPES
from stages.nets.run_folder import newest_checkpoint
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.scale.operations import pass_operations
from stages.scale.rates import BRANCHES, FORWARD_AND_BACKWARD
from stages.system.device import one_thread
from stages.system.disk import free_bytes
from stages.system.memory import GIB, available_bytes
from stages.train.block_weighter import BlockWeighter
from stages.train.loop import initial_state
from stages.train.objective import Objective
from stages.train.step import TrainingStep

COMPARED_FLOPS = 30e12
"""Operations a second of a device with which the cost is compared."""
VERDICT_STUDENTS = 4
WEIGHT_AVERAGE_GRADIENT = 3
MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.5, "muon": 1.0}
"""Of an optimizer, in numbers of four bytes for each weight; Muon's own, for all weights."""
CHECKPOINT_COPIES = 4
"""Weights, average and two moments."""
EXPORTED_COPIES = 2
"""The diffusers folder, and the single file beside it."""


@dataclass(frozen=True)
class PartCost:
    """The cost of one part; a pass is one latent through the UNet under one branch."""

    name: str
    passes: int
    """Forward passes, a pass with its gradient counted as `FORWARD_AND_BACKWARD`."""
    seconds: float
    memory: int
    """Bytes at its peak, in all; on a CPU those of the parts before it, if they were more."""

    def line(self, flop_of_pass: float) -> str:
        """The cost as text."""
        flop = self.passes * flop_of_pass
        return (
            f"{self.name:<9}{self.passes:>12,} passes {flop / 1e12:>12,.1f} TFLOP {self.seconds:>9,.0f} s "
            f"{self.memory / GIB:>8.2f} GiB"
        )


@dataclass(frozen=True)
class Plan:
    """The cost of the missing parts of a conversion."""

    parts: tuple[PartCost, ...]
    start_seconds: float
    flop_of_pass: float
    """Multiplications and additions of one pass at the main size, each counted as one."""
    disk: dict[str, int]
    """Bytes that stay, by what they are."""
    folder: Path
    remark: str = ""

    def lines(self) -> list[str]:
        """The plan as text."""
        seconds = self.start_seconds + sum(part.seconds for part in self.parts)
        flop = self.flop_of_pass * sum(part.passes for part in self.parts)
        disk = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.disk.items())
        on_device = flop / COMPARED_FLOPS / 60
        return [
            *(part.line(self.flop_of_pass) for part in self.parts),
            *([self.remark] if self.remark else []),
            f"time     {seconds / 60:.1f} minutes, if it stays as busy here as it is now, {self.start_seconds:.0f} s "
            "of them to start",
            f"counted  {flop / 1e12:,.1f} TFLOP, {self.flop_of_pass / 1e9:,.2f} GFLOP a pass: {on_device:,.1f} minutes "
            f"of a device that sustains {COMPARED_FLOPS / 1e12:.0f} TFLOP/s",
            f"disk     {sum(self.disk.values()) / GIB:.2f} GiB ({disk})",
            f"free     {free_bytes(self.folder) / GIB:.2f} GiB at {self.folder}",
        ]


def print_plan(conversion: Conversion) -> None:
    """Print the cost of what is missing of a conversion; nothing is written."""
    began = time.perf_counter()
    plan = make_plan(conversion)
    print("\n".join(plan.lines()))
    print(f"measured in {time.perf_counter() - began:.0f} s; a gate may end the polish earlier")


def make_plan(conversion: Conversion) -> Plan:
    """Count the passes of each part; a pass is measured here, and a training step where its memory allows."""
    config, job, teacher = conversion.config, conversion.job, conversion.teacher
    size, start = conversion.main_size, time.time() - psutil.Process().create_time()
    cache = cache_cost(job)
    seconds_of_pass = pass_seconds(teacher, size, min(config.train.batch_size, config.render.batch_size))
    unet_bytes = sum(value.numel() * 4 for value in teacher.components.unet.parameters())
    sampled_peak = peak_memory() + unet_bytes * (1 if teacher.components.unet.device.type == "cuda" else 2)

    parts = []
    if not (conversion.folder / START_FILE).exists():
        passes = paired_passes(config.probe.prompts, [config.probe.sampler.steps], 1 + len(config.start_names))
        parts.append(PartCost("probe", passes, passes * seconds_of_pass, sampled_peak))
    parts.append(cache)
    samples, extra = remaining_samples(conversion), checkpoint_passes(conversion)
    trained = samples * BRANCHES * FORWARD_AND_BACKWARD
    remark = ""
    if (needed := step_bytes(conversion)) > (free := free_memory(conversion)):
        seconds, memory = trained * seconds_of_pass, needed
        remark = (
            f"polish   a step may take {needed / GIB:.1f} GiB more, {free / GIB:.1f} are free: counted, not measured"
        )
    else:
        step = measure_step(conversion, size)
        seconds, memory = math.ceil(samples / config.train.batch_size) * step.seconds, step.memory
    parts.append(PartCost("polish", trained + extra, seconds + extra * seconds_of_pass, memory))
    if not (conversion.folder / VERDICT_FILE).exists():
        passes = paired_passes(config.verdict.prompts, config.verdict.steps, VERDICT_STUDENTS)
        parts.append(PartCost("verdict", passes, passes * seconds_of_pass, sampled_peak))
    kept = config.train.keep.last + 1  # the best stays too
    stored = sum(record_bytes_by_size(job)[task.size] * len(task.prompts) for task in missing_tasks(job))
    return Plan(
        tuple(parts),
        start,
        pass_operations(teacher, size),
        {"cache": stored, "checkpoints": kept * CHECKPOINT_COPIES * unet_bytes, "export": exported_bytes(teacher)},
        config.out,
        remark,
    )


def missing_tasks(job: CacheJob) -> list[ShardTask]:
    """The shards of the cache that are not there yet."""
    return unfinished_tasks(job.writer, job.tasks)


def cache_cost(job: CacheJob) -> PartCost:
    """The cache's cost by its passes, of which one of each picture size is measured in the cache's own precision."""
    states, passes, seconds = job.config.render.states, 0, 0.0
    calls = BRANCHES * (states.steps + states.renoised_states)
    prompts = Counter[PictureSize]()
    rows: dict[PictureSize, int] = {}
    for task in missing_tasks(job):
        prompts[task.size] += len(task.prompts)
        rows[task.size] = task.batch_size
    for size, count in prompts.items():
        passes += count * calls
        seconds += count * calls * pass_seconds(job.teacher, size, rows[size])
    return PartCost("cache", passes, seconds, peak_memory())


def paired_passes(prompts: int, steps: Sequence[int], students: int) -> int:
    """Passes that paired errors of so many students take: two references of the teacher, its floors, the students."""
    return BRANCHES * prompts * (2 * REFERENCE_FACTOR * max(steps) + (1 + students) * sum(steps))


def remaining_samples(conversion: Conversion) -> int:
    """Training samples of the polish beyond its newest checkpoint."""
    return max(0, conversion.config.train.max_samples - newest_checkpoint(conversion.folder))


def checkpoint_passes(conversion: Conversion) -> int:
    """Passes at the checkpoints that the polish still has to reach: validation, grid and gate."""
    config = conversion.config
    checkpoints = math.ceil(remaining_samples(conversion) / config.train.checkpoint_every_samples)
    validated = 3 * config.validation.states
    shown = len(config.grid.prompts) * config.grid.sampler.steps
    gated = config.probe.prompts * config.probe.sampler.steps if config.gate is not None else 0
    reference = paired_passes(config.probe.prompts, [config.probe.sampler.steps], 0) if gated else 0
    return BRANCHES * (checkpoints * (validated + shown + gated) + 2 * shown) + reference


def pass_seconds(teacher: Teacher, size: PictureSize, rows: int) -> float:
    """The seconds of one latent's pass, in a batch of `rows` states under both branches; the first call warms up."""
    batch = blank_batch(teacher, size, rows)
    k, s = teacher.bridge.nearest_state(torch.full([rows], 0.5, device=batch.s.device))

    def predict() -> None:
        teacher.predict(batch.x_s, s.float(), k, batch.cond, teacher.uncond)

    with one_thread():
        predict()
        return seconds_of(predict) / (BRANCHES * rows)


def blank_batch(teacher: Teacher, size: PictureSize, rows: int) -> Batch:
    """Rows of the shapes that a batch of this size has."""
    batch = collate([blank_record(teacher, 1, size)] * rows, [0] * rows)
    return batch.to(teacher.uncond.device, torch.float32)


def step_bytes(conversion: Conversion) -> int:
    """What a training step takes beyond the models that are loaded: what is kept for each weight, and as much again.

    The activations depend on batch and size, and a system that runs out of memory ends any process.
    """
    unet = conversion.teacher.components.unet
    copies = WEIGHT_AVERAGE_GRADIENT + MOMENTS[conversion.config.train.optimizer.kind]
    return int(2 * copies * sum(value.numel() * 4 for value in unet.parameters()))


def free_memory(conversion: Conversion) -> int:
    """Bytes that are free on the device of the training."""
    device = conversion.runtime.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


@dataclass(frozen=True)
class MeasuredStep:
    """A training step as it was measured."""

    seconds: float
    memory: int


def measure_step(conversion: Conversion, size: PictureSize) -> MeasuredStep:
    """A step on a batch of this size, of a plain copy of the fine-tune; of two the second is timed."""
    config, runtime, teacher = conversion.config, conversion.runtime, conversion.teacher
    student = Student.from_teacher(teacher.components.unet)
    objective = Objective(config.objective.model_copy(update={"block_weight": 0.0}), ())
    weighter = BlockWeighter(objective.static_lambdas(runtime.device))
    state = initial_state(student, objective, config.train, conversion.folder, runtime, weighter)
    state.anomalies.path = None  # nothing is written
    step = TrainingStep(state, objective.to(runtime.device), teacher.uncond, config.train, runtime)
    batch = blank_batch(teacher, size, config.train.batch_size)
    step(batch, 0.0)
    seconds = seconds_of(lambda: step(batch, 0.0))
    measured = MeasuredStep(seconds, peak_memory())
    runtime.release(step.model)
    return measured


def seconds_of(act: Callable[[], object]) -> float:
    """The time that an act takes, until its device has computed it."""
    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def exported_bytes(teacher: Teacher) -> int:
    """Bytes of the folder and the single file that an export writes."""
    parts = teacher.components
    numbers = sum(value.numel() for part in (parts.unet, parts.vae, parts.text_encoder) for value in part.parameters())
    return EXPORTED_COPIES * numbers * DTYPES[DEFAULT_OPTIONS.dtype].itemsize
