"""What a conversion will cost on this machine: counted operations, times a few of them measured here."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.values import PictureSize
from shards.batch import collate
from shards.record import Record
from stages.cache.plan import peak_memory
from stages.cache.targets import make_records
from stages.cache_teacher import cost_of
from stages.convert.conversion import Conversion
from stages.convert.results import START_FILE, VERDICT_FILE
from stages.evaluate.paired import REFERENCE_FACTOR
from stages.export.verify_export import DEFAULT_OPTIONS, DTYPES
from stages.nets.run_folder import newest_checkpoint
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.system.device import one_thread
from stages.system.disk import free_bytes
from stages.system.memory import GIB
from stages.train.block_weighter import BlockWeighter
from stages.train.loop import initial_state
from stages.train.objective import Objective
from stages.train.state import checkpoint_bytes
from stages.train.step import TrainingStep

BRANCHES = 2
FORWARD_AND_BACKWARD = 3
"""Forward passes that take as many operations as one with its gradient."""
COMPARED_FLOPS = 30e12
"""Operations a second of a device with which the cost is compared."""
VERDICT_STUDENTS = 4
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

    def lines(self) -> list[str]:
        """The plan as text."""
        seconds = self.start_seconds + sum(part.seconds for part in self.parts)
        flop = self.flop_of_pass * sum(part.passes for part in self.parts)
        disk = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.disk.items())
        on_device = flop / COMPARED_FLOPS / 60
        return [
            *(part.line(self.flop_of_pass) for part in self.parts),
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
    """Count the passes of each part, and measure a pass, a training step and the cache's first batch."""
    config, job, teacher = conversion.config, conversion.job, conversion.teacher
    size = conversion.main_size
    records = sample_records(conversion, size)
    cost = cost_of(job)
    cache_peak = peak_memory()
    seconds_of_pass, flop_of_pass = measure_pass(teacher, records)
    unet_bytes = sum(value.numel() * 4 for value in teacher.components.unet.parameters())
    sampled_peak = peak_memory() + unet_bytes * (1 if teacher.components.unet.device.type == "cuda" else 2)

    parts = []
    if not (conversion.folder / START_FILE).exists():
        passes = paired_passes(config.probe.prompts, [config.probe.sampler.steps], 1 + len(config.start_names))
        parts.append(PartCost("probe", passes, passes * seconds_of_pass, sampled_peak))
    states = config.render.states
    calls = BRANCHES * (states.steps + states.renoised_states)
    parts.append(PartCost("cache", cost.prompts * calls, cost.seconds, cache_peak))
    measured, extra = measure_step(conversion, records), checkpoint_passes(conversion)
    samples = remaining_samples(conversion)
    steps = math.ceil(samples / config.train.batch_size)
    passes = samples * BRANCHES * FORWARD_AND_BACKWARD + extra
    seconds = steps * measured.seconds + extra * seconds_of_pass
    parts.append(PartCost("polish", passes, seconds, measured.memory))
    if not (conversion.folder / VERDICT_FILE).exists():
        passes = paired_passes(config.verdict.prompts, config.verdict.steps, VERDICT_STUDENTS)
        parts.append(PartCost("verdict", passes, passes * seconds_of_pass, sampled_peak))
    kept = config.train.keep.last + 1  # the best stays too
    return Plan(
        tuple(parts),
        cost.start_seconds,
        flop_of_pass,
        {"cache": cost.bytes, "checkpoints": kept * measured.checkpoint_bytes, "export": exported_bytes(teacher)},
        config.out,
    )


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


def sample_records(conversion: Conversion, size: PictureSize) -> list[Record]:
    """Records of the first prompts of one size, as many as a training step reads."""
    config, job = conversion.config, conversion.job
    task = next((one for one in job.all_tasks if one.size == size), job.all_tasks[0])
    wanted = math.ceil(config.train.rows_of(task.size) / config.render.states.states_per_prompt)
    prompts = task.prompts[: min(wanted, task.batch_size)]
    keys = [f"{number:09d}" for number in task.numbers[: len(prompts)]]
    with one_thread():
        return make_records(job.teacher, prompts, keys, config.render.states, task.size)


def measure_pass(teacher: Teacher, records: Sequence[Record]) -> tuple[float, float]:
    """Seconds and operations of one pass, of a batch of states under both branches."""
    batch = collate(records, [0] * len(records)).to(teacher.uncond.device, torch.float32)

    def predict() -> None:
        teacher.predict(batch.x_s, batch.s, batch.k, batch.cond, teacher.uncond)

    predict()
    seconds = seconds_of(predict)
    with FlopCounterMode(display=False) as counter:
        predict()
    passes = BRANCHES * len(records)
    return seconds / passes, counter.get_total_flops() / passes


@dataclass(frozen=True)
class MeasuredStep:
    """A training step as it was measured."""

    seconds: float
    memory: int
    checkpoint_bytes: int


def measure_step(conversion: Conversion, records: Sequence[Record]) -> MeasuredStep:
    """A step on a batch of these records, of a plain copy of the fine-tune; of two the second is timed."""
    config, runtime, teacher = conversion.config, conversion.runtime, conversion.teacher
    student = Student.from_teacher(teacher.components.unet)
    objective = Objective(config.objective.model_copy(update={"block_weight": 0.0}), ())
    weighter = BlockWeighter(objective.static_lambdas(runtime.device))
    state = initial_state(student, objective, config.train, conversion.folder, runtime, weighter)
    state.anomalies.path = None  # nothing is written
    step = TrainingStep(state, objective.to(runtime.device), teacher.uncond, config.train, runtime)
    rows = config.train.batch_size
    places = [divmod(i, len(records)) for i in range(rows)]
    states = config.render.states.states_per_prompt
    batch = collate([records[j] for _, j in places], [i % states for i, _ in places])
    step(batch, 0.0)
    seconds = seconds_of(lambda: step(batch, 0.0))
    measured = MeasuredStep(seconds, peak_memory(), checkpoint_bytes(student))
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
