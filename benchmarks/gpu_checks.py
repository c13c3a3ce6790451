"""What holds to the last bit on the card, and what only nearly: resuming, precisions, and micro-batches."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu_report import Budget, RecordFigures
from benchmarks.gpu_training import Measured, train
from benchmarks.gpu_world import DAVID_FIT, DRY_CACHE, World
from configs.load import load
from shards.batch import Batch
from shards.reader import Reader
from stages import cache_teacher, distill
from stages.cached_training import TrainingData
from stages.nets.graft import graft_time_embedding
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.system.refusal import Refused, in_one_line
from stages.train.block_weighter import DAVID_FOLDER
from stages.train.checkpoint import Checkpoints
from stages.train.runtime import Precision
from stages.train.step import TrainingStep
from stages.train.validation import read_first_states, velocity_errors

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
COMPARED_STATES, COMPARED_BATCH = 32, 8
CHECKED_BATCH = 4
RESUME_SAMPLES, RESUME_HALF = 16, 8
NAMED_TENSORS = 5
TINY = Path("configs/tiny.yaml")


def precisions_on(device: torch.device) -> tuple[Precision, ...]:
    """Those that differ on a device: a CPU computes in fp32 whatever the precision."""
    return PRECISIONS[:1] if device.type == "cpu" else PRECISIONS


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """fp32 convolutions without their rounding to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def precisions(world: World, budget: Budget, record: RecordFigures) -> None:
    """The student's velocities in each precision against fp32 without TF32, at cached states; by bin of s."""
    teacher, uncond = world.teacher, world.teacher.uncond
    student = Student.from_teacher(teacher.components.unet).eval().requires_grad_(False)
    graft_time_embedding(student.unet, teacher.bridge)
    reader = Reader(world.cache, "train", 0, unstated_size=teacher.components.native_size)
    with exact_convolutions(), torch.inference_mode():
        batches = [
            exact_rows(student, batch, uncond) for batch in read_first_states(reader, COMPARED_STATES, COMPARED_BATCH)
        ]
    errors: dict[str, Any] = {}
    for precision in PRECISIONS:
        budget.check(precision)
        runtime = world.runtime(precision)
        model: Any = runtime.prepare(student)
        measured = velocity_errors(model, batches, uncond)
        runtime.release(student)
        computed = runtime.accelerator.mixed_precision
        errors[precision] = {
            "computed_in": "fp32" if computed == "no" else computed,
            "velocity": measured.velocity.overall,
            "velocity_by_s": list(measured.velocity.by_bin),
            "guidance": measured.guidance.overall,
        }
        record({"states": measured.states, "relative_squared_error": dict(errors)})


def exact_rows(student: Student, batch: Batch, uncond: Tensor) -> Batch:
    """The same states, with this student's own velocities in place of its teacher's."""
    moved = batch.to(uncond.device, torch.float32)
    output = student(moved.x_s, moved.s, moved.cond, uncond)
    return replace(batch, v_cond=output.v_cond.cpu(), v_uncond=output.v_uncond.cpu())


@dataclass(frozen=True)
class FirstStep:
    """The loss and the clipped gradient of the first step of a run, on the CPU."""

    loss: float
    gradient: Mapping[str, Tensor]


def first_step(world: World, precision: Precision, accumulate: int) -> FirstStep:
    """The first step of `sollune distill` on a few states, in so many micro-batches."""
    options = ["--train.batch-size", str(CHECKED_BATCH), "--train.accumulate", str(accumulate)]
    options += ["--train.precision", precision, "--train.optimizer.kind", "adamw"]
    config, teacher = world.distill_config("80gb", options), world.teacher
    runtime = world.runtime(precision)
    data = TrainingData.open(world.cache, config.train, runtime, teacher.components.native_size)
    student = Student.from_teacher(teacher.components.unet)
    call, losses = TrainingStep.__call__, list[float]()

    def once(step: TrainingStep, batch: Batch, data_wait_seconds: float) -> None:
        result = call(step, batch, data_wait_seconds)
        if result is None and len(losses) < config.train.max_skips:
            losses.append(float("nan"))  # fp16: the scale of the loss is halved, and the next batch is tried
            return
        losses.append(float("nan") if result is None else float(result.losses.total))
        raise Measured

    with patch.object(TrainingStep, "__call__", once), patch.object(Checkpoints, "refuse_small_disk"):
        try:
            train(data, config, world.fresh_folder("distill", kept=DAVID_FOLDER), student, teacher, runtime)
        except Measured:
            gradient = {name: p.grad.cpu() for name, p in student.named_parameters() if p.grad is not None}
            return FirstStep(losses[-1], gradient)
    raise Refused("training ended before its first step")


def micro_batches(world: World, budget: Budget, record: RecordFigures) -> None:
    """The gradient of two micro-batches against that of the batch at once, beside that of the same step done twice."""
    for precision in precisions_on(world.device)[:2]:
        budget.check(precision)
        try:
            whole = first_step(world, precision, 1)
            world.release()
            again = differences(whole.gradient, first_step(world, precision, 1).gradient, world.device)
            record({precision: {"loss": whole.loss, "same_step_again": again}})
            world.release()
            halves = first_step(world, precision, 2)
        except torch.OutOfMemoryError as error:
            record({precision: {"left_out": in_one_line(error)}})
            continue
        found = {"loss": halves.loss, **differences(whole.gradient, halves.gradient, world.device)}
        record({precision: {"loss": whole.loss, "same_step_again": again, "accumulate_2": found}})
        world.release()


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """How many tensors are equal to the last bit, the first that are not, and the relative size of all differences."""
    unequal, squares = list[str](), torch.zeros(2, dtype=torch.float64)
    if one.keys() != other.keys():
        raise Refused(f"tensors to compare: {len(one)} and {len(other)}, not the same ones")
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            unequal.append(name)
        if tensor.is_floating_point():
            here, there = tensor.to(device), other[name].to(device)
            sums = [(here - there).norm(), here.norm()]
            squares += torch.tensor([float(value) ** 2 for value in sums], dtype=torch.float64)
    moved, whole = squares.tolist()
    return {
        "equal_tensors": len(one) - len(unequal),
        "unequal_tensors": len(unequal),
        "first_unequal": unequal[:NAMED_TENSORS],
        "relative_difference": (moved / whole) ** 0.5 if whole else 0.0,
    }


def resume(world: World, budget: Budget, record: RecordFigures) -> None:
    """The embedded student trained in one go, twice, and resumed from its checkpoint in the middle; what is equal.

    Where the same run done twice differs, resuming cannot be exact; then both are tried with deterministic algorithms.
    """
    parts = world.embedded_components
    teacher = Teacher(parts, "hold")
    run = world.fresh_folder("resume")
    common = ["--run", str(run), "--device", str(world.device)]
    cache = load(cache_teacher.Config, "cache_teacher", [TINY], [*common, *DRY_CACHE, "--teacher", str(parts.location)])
    cache_teacher.run(cache)
    figures: dict[str, Any] = {}
    for precision in precisions_on(world.device):
        budget.check(precision)
        figures[precision] = resumed(world, teacher, run, precision)
        record(figures)
        if figures[precision]["same_run_again"]["unequal_tensors"]:
            budget.check(f"{precision} with deterministic algorithms")
            with deterministic_algorithms():
                figures[f"{precision}, deterministic algorithms"] = resumed(world, teacher, run, precision)
            record(figures)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Algorithms whose sums have one order, where torch has such; where not, it goes on as before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def resumed(world: World, teacher: Teacher, run: Path, precision: Precision) -> dict[str, Any]:
    """The end of a run against that of the same again, and of one that goes on from the first one's checkpoint."""
    options = [
        *("--run", str(run), "--device", str(world.device), "--train.precision", precision),
        *("--train.batch-size", "4", "--train.max-samples", str(RESUME_SAMPLES)),
        *("--train.checkpoint-every-samples", str(RESUME_HALF), "--train.keep.last", "3"),
        *DAVID_FIT,
    ]
    config = load(distill.Config, "distill", [TINY], options)
    ends = {}
    for name in ("first", "again", "resumed"):
        folder = world.fresh_folder(f"resume/{name}", kept=DAVID_FOLDER)  # its fit depends on the cache alone
        if name != "first":
            shutil.copytree(run / "first" / DAVID_FOLDER, folder / DAVID_FOLDER, dirs_exist_ok=True)
        if name == "resumed":
            half = f"checkpoints/{RESUME_HALF:09d}"
            shutil.copytree(run / "first" / half, folder / half)
        runtime = world.runtime(precision)
        data = TrainingData.open(run / "cache", config.train, runtime, teacher.components.native_size)
        student = Student.from_teacher(teacher.components.unet)
        graft_time_embedding(student.unet, teacher.bridge)
        train(data, config, folder, student, teacher, runtime)
        ends[name] = checkpoint_tensors(folder / "checkpoints" / f"{RESUME_SAMPLES:09d}")
    return {
        "same_run_again": differences(ends["first"], ends["again"], world.device),
        "resumed": differences(ends["first"], ends["resumed"], world.device),
    }


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor and number of a checkpoint, by file and place."""
    tensors = dict[str, Tensor]()
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {f"{file.stem}: {name}": value for name, value in load_file(file).items()}
    for file in sorted(folder.glob("*.pt")):
        content = torch.load(file, map_location="cpu", weights_only=True)
        tensors |= {f"{file.stem}: {name}": value for name, value in leaves(content)}
    return tensors


def leaves(content: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors and numbers of nested mappings and lists, by their place."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, int | float):
        yield place, torch.tensor(content, dtype=torch.float64)
    elif isinstance(content, Mapping | list | tuple):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for name, value in items:
            yield from leaves(value, f"{place}/{name}")
