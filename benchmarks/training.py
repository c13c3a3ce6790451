"""What a step of training costs, beside two other ways: `python -m benchmarks.training [--size full]`.

shards   `fit` as `sollune distill` calls it: both branches and features from a cache of random records, no assessor.
online   the same, but a frozen teacher predicts velocities and features of both branches at every step. Its states are
         cached: neither the solver that makes them, nor the VAE, nor the text encoder is in its time.
example  the loop of diffusers' training example on one branch, with twice the batch: as many rows through the UNet.

They take turns. At full size (SD1.5's, random weights, gradient checkpointing, one state a step) each is a process of
its own, whose peak memory is measured; no checkpoint is written; and the online step is the sum of one from shards and
one of the teacher's predictions, because both together do not fit into 23 GB. `--only shards` measures one of them.
`--clock cpu` counts this process's CPU seconds, for a CPU that is shared.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel

from benchmarks import full_size, training_peer
from benchmarks.cache import CallTimer, now
from configs.load import load
from configs.values import PictureSize
from shards.batch import Batch
from shards.manifest import Recipe
from shards.reader import Reader
from shards.record import BlockFeatures, Record, States
from shards.writer import CacheWriter
from stages.distill import Config
from stages.flow.schedule import NoiseSchedule
from stages.nets.components import Components
from stages.nets.features import feature_widths
from stages.nets.student import Student
from stages.nets.teacher import Teacher
from stages.system.device import device_of
from stages.teacher_files.folder import read_json
from stages.train.checkpoint import Checkpoints
from stages.train.loop import Batches, fit
from stages.train.losses import FeatureScale
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.runtime import Runtime
from stages.train.setup import TrainConfig
from stages.train.step import TrainingStep

EMBEDDED = Path("stages/tiny/model")
STATES_PER_RECORD, LIMIT, PIXELS_PER_LATENT = 6, 0.02, 8
NAMES = ("shards", "online", "example")
CLOCKS: dict[str, Callable[[], float]] = {"wall": now, "cpu": time.process_time}


@dataclass(frozen=True)
class Setup:
    """What is measured: a UNet, the length of its prompts, and its training."""

    full: bool
    steps: int
    tokens: int
    config: TrainConfig
    clock: str

    @property
    def now(self) -> Callable[[], float]:
        """Reads the clock."""
        return CLOCKS[self.clock]

    def unet(self) -> UNet2DConditionModel:
        """A new one, with gradient checkpointing at full size."""
        if not self.full:
            return UNet2DConditionModel.from_pretrained(EMBEDDED / "unet")
        unet = full_size.unet()
        unet.enable_gradient_checkpointing()
        return unet


@dataclass
class LoopTiming:
    """One contender's steps, in seconds; shares of all the time, and the most memory held, in bytes."""

    steps: list[float]
    waiting_share: float = 0.0
    bookkeeping_share: float = 0.0
    checkpoint: float = 0.0
    peak_bytes: int = field(default_factory=lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def records(setup: Setup, unet: UNet2DConditionModel, count: int) -> Iterator[Record]:
    """Random numbers in the shape of this teacher's predictions."""
    latent, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        x_s, v_cond, v_uncond = torch.randn(3, STATES_PER_RECORD, 4, latent, latent, generator=generator).half()
        k = torch.randint(1000, (STATES_PER_RECORD,), generator=generator)
        states = States(k, k / 1000, x_s, v_cond, v_uncond, torch.ones(STATES_PER_RECORD, dtype=torch.bool))
        features = {
            b: torch.randn(STATES_PER_RECORD, n, generator=generator).half() for b, n in feature_widths(unet).items()
        }
        cond = torch.randn(setup.tokens, width, generator=generator).half()
        size = PictureSize(PIXELS_PER_LATENT * latent, PIXELS_PER_LATENT * latent)
        yield Record(f"{number:09d}", "a", "none", number, 5.0, cond, x_s[0], states, BlockFeatures(features), size)


def reader_of(setup: Setup, unet: UNet2DConditionModel, folder: Path) -> Reader:
    """A cache of random records, opened."""
    count = 4 if setup.full else 200
    CacheWriter(folder, Recipe(identity={"benchmark": "training"})).add("train", 0, records(setup, unet, count))
    return Reader(folder, "train", 0, setup.config.batch_size)


def from_shards(setup: Setup, device: torch.device) -> LoopTiming:
    """The loop as it is."""
    return measure_fit(setup, device, lambda reader: reader.batches)


def online(setup: Setup, device: torch.device) -> LoopTiming:
    """The loop with a teacher in it; at full size the teacher alone, one prediction for each step."""
    unet = setup.unet().eval().requires_grad_(False).to(device)
    schedule = NoiseSchedule.from_config(read_json(EMBEDDED / "scheduler" / "scheduler_config.json"))
    absent: Any = None
    teacher = Teacher(Components("", Path(), unet, absent, absent, absent, schedule), "hold")

    def predicted(batch: Batch) -> Batch:
        moved = batch.to(device, torch.float32)
        output = teacher.predict(moved.x_s, moved.s, moved.k, moved.cond, torch.zeros_like(moved.cond[:1]))
        return replace(moved, v_cond=output.v_cond, v_uncond=output.v_uncond, features=output.features)

    if not setup.full:
        return measure_fit(setup, device, lambda reader: lambda start: map(predicted, reader.batches(start)))
    with tempfile.TemporaryDirectory() as folder:
        batches, seconds = reader_of(setup, unet, Path(folder)).batches(0), []
        for _ in range(setup.steps):
            batch, began = next(batches), setup.now()
            predicted(batch)
            seconds.append(setup.now() - began)
    return LoopTiming(seconds)


def example(setup: Setup, device: torch.device) -> LoopTiming:
    """The loop of diffusers' training example."""
    unet = setup.unet().to(device)
    latent, width = unet.config["sample_size"], unet.config["cross_attention_dim"]
    rows = 2 * setup.config.batch_size

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.randn(rows, 4, latent, latent), torch.randn(rows, setup.tokens, width)

    return LoopTiming(training_peer.step_seconds(unet, batches(), setup.steps, device, setup.now))


def measure_fit(setup: Setup, device: torch.device, batches_of: Callable[[Reader], Batches]) -> LoopTiming:
    """`fit` over the batches, timed from the first one's arrival to the end of the last step."""
    unet, config = setup.unet(), setup.config
    student = Student(unet)
    deviations = {block: torch.ones(1, n) for block, n in feature_widths(unet).items()}
    objective = Objective(ObjectiveConfig(), student.blocks, FeatureScale(deviations))
    stepping, saving, arrived, waits = CallTimer(setup.now), CallTimer(setup.now), [], []

    def timed(batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = setup.now()
            batch = next(batches)
            arrived.append(setup.now())
            waits.append(arrived[-1] - start)
            yield batch

    with tempfile.TemporaryDirectory() as folder, ExitStack() as clocks:
        batches = batches_of(reader_of(setup, unet, Path(folder) / "cache"))
        clocks.enter_context(stepping.time_calls(TrainingStep, "__call__"))
        if setup.full:
            clocks.enter_context(patch.object(Checkpoints, "save"))
        clocks.enter_context(saving.time_calls(Checkpoints, "save"))
        uncond = torch.zeros(1, setup.tokens, unet.config["cross_attention_dim"])
        fit(
            student,
            objective,
            lambda start: timed(batches(start)),
            uncond,
            config,
            Path(folder) / "distill",
            runtime=Runtime(device, config.precision),
            identity={},
        )
    last = stepping.spans[-1]
    whole, waiting = last[1] - arrived[0], sum(waits[1 : setup.steps])
    steps = [after - before for before, after in pairwise(arrived[: setup.steps])]
    bookkeeping = whole - waiting - stepping.seconds
    return LoopTiming([*steps, last[1] - last[0]], waiting / whole, bookkeeping / whole, saving.seconds)


CONTENDERS: dict[str, Callable[[Setup, torch.device], LoopTiming]] = dict(
    zip(NAMES, (from_shards, online, example), strict=True)
)


def measure_contender(name: str, setup: Setup, device: str) -> LoopTiming:
    """One contender's turn; at full size in a process of its own."""
    if not setup.full:
        return CONTENDERS[name](setup, device_of(device))
    # spawned, so that nothing of this process counts in its memory
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure_in_process, name, setup, device).result()


def measure_in_process(name: str, setup: Setup, device: str) -> LoopTiming:
    """A contender in a process of its own."""
    return CONTENDERS[name](setup, device_of(device))


def setup_of(full: bool, steps: int, batch_size: int, clock: str, optimizer: str) -> Setup:
    """The configuration of the size, for so many steps."""
    arguments = ["--train.optimizer.kind", optimizer]
    train = load(Config, "distill", [Path(f"configs/{'sd15' if full else 'tiny'}.yaml")], arguments).train
    changes = {"batch_size": batch_size, "max_samples": steps * batch_size}
    return Setup(full, steps, 77 if full else 24, train.model_copy(update=changes), clock)


def table(timings: dict[str, list[LoopTiming]], setup: Setup) -> list[str]:
    """Medians over the rounds; ratios are taken round by round."""
    lines = ["| loop | step | over ours | data wait | bookkeeping |", "|---|---|---|---|---|"]
    steps = {name: [statistics.median(timing.steps) for timing in rounds] for name, rounds in timings.items()}
    if setup.full and {"shards", "online"} <= steps.keys():
        steps["online"] = [a + b for a, b in zip(steps["shards"], steps["online"], strict=True)]
    for name, seconds in steps.items():
        cells = [f"{statistics.median(seconds):.3f} s", "", "", ""]
        if "shards" in steps:
            ratios = [a / b for a, b in zip(seconds, steps["shards"], strict=True)]
            cells[1] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if name == "shards":
            cells[2] = f"{statistics.median(timing.waiting_share for timing in timings[name]):.2%}"
            cells[3] = f"{statistics.median(timing.bookkeeping_share for timing in timings[name]):.2%}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def checkpoint_line(timings: list[LoopTiming], setup: Setup) -> str:
    """What checkpoints cost, as often as the configuration writes them."""
    seconds = statistics.median(timing.checkpoint for timing in timings)
    between = setup.config.checkpoint_every_samples / setup.config.batch_size
    share = seconds / (between * statistics.median(step for timing in timings for step in timing.steps))
    return f"a checkpoint, written and read back: {seconds:.2f} s, every {between:.0f} steps: {share:.2%}"


def main() -> int:
    """0 when waiting and bookkeeping are within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--steps", type=int, help="of a turn (default: 41; 2 at full size)")
    parser.add_argument("--batch-size", type=int, help="states of a step (default: 32; 1 at full size)")
    parser.add_argument("--optimizer", default="adamw", help="of our loop; the example always trains with AdamW")
    parser.add_argument("--rounds", type=int, help="default: 5; 1 at full size")
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    full = options.size == "full"
    setup = setup_of(
        full,
        options.steps or (2 if full else 41),
        options.batch_size or (1 if full else 32),
        options.clock,
        options.optimizer,
    )
    timings: dict[str, list[LoopTiming]] = {name: [] for name in options.only or NAMES}
    for _ in range(options.rounds or (1 if full else 5)):
        for name, rounds in timings.items():
            rounds.append(measure_contender(name, setup, options.device))
            if full:
                each = ", ".join(f"{seconds:.1f}" for seconds in rounds[-1].steps)
                print(f"{name}: steps of {each} s, at most {rounds[-1].peak_bytes / 1e9:.2f} GB in memory", flush=True)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    turns = f"{setup.steps} steps a turn, {len(next(iter(timings.values())))} rounds, {where}, {options.clock} clock"
    print(f"\n{options.size}, {setup.config.batch_size} states a step, {turns}\n")
    print("\n".join(table(timings, setup)))
    if "shards" not in timings:
        return 0
    if not full:
        print(f"\n{checkpoint_line(timings['shards'], setup)}")
    ours = timings["shards"]
    shares = [
        statistics.median(timing.waiting_share for timing in ours),
        statistics.median(timing.bookkeeping_share for timing in ours),
    ]
    print(f"\nlimit of each share {LIMIT:.0%}")
    return 0 if max(shares) <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
