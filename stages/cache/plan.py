"""The cost of a cache before it is made, and the free disk space before and while it is."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from configs.values import PictureSize
from shards.codec import encode
from shards.record import BlockFeatures, Landings, Record, States
from stages.cache.fill import RecordMaker, ShardTask, count_prompts
from stages.cache.landings import landing_times
from stages.nets.features import feature_widths
from stages.nets.teacher import Teacher
from stages.scale.fleet import longest_share
from stages.system.disk import free_bytes
from stages.system.refusal import Refused

TAR_BLOCK = 512
MARGIN_BYTES = 16 << 20
"""Left free for the manifest, its journal and other programs on the same disk."""


@dataclass(frozen=True)
class SizeCost:
    """The cost of the missing records of one size."""

    size: PictureSize
    prompts: int
    bytes: int
    seconds_per_prompt: float

    def line(self) -> str:
        """The cost as text."""
        return (
            f"{f'at {self.size}':<17}{self.prompts:,} prompts, {self.bytes:,} bytes, "
            f"{self.seconds_per_prompt:.3g} s a prompt"
        )


@dataclass(frozen=True)
class Cost:
    """The cost of the missing part of a cache."""

    by_size: tuple[SizeCost, ...]
    states: int
    start_seconds: float
    seconds: float
    peak_bytes: int
    workers: int

    @property
    def prompts(self) -> int:
        """Prompts of all sizes."""
        return sum(one.prompts for one in self.by_size)

    @property
    def bytes(self) -> int:
        """Bytes of all sizes."""
        return sum(one.bytes for one in self.by_size)

    def lines(self, folder: Path) -> list[str]:
        """The cost as text; a line for each size where there are several."""
        whole = self.start_seconds + self.seconds
        lines = [
            f"prompts to make  {self.prompts:,} ({self.states:,} states)",
            *(one.line() for one in self.by_size if len(self.by_size) > 1),
            f"bytes            {self.bytes:,} ({self.bytes / 2**30:.2f} GiB)",
            f"time             {whole / 3600:.2f} hours, if it stays as busy here as it is now "
            f"({whole:.0f} s from start to end, {self.start_seconds:.0f} of them to start)",
            f"peak memory      {self.workers * self.peak_bytes / 2**30:.2f} GiB",
            f"free disk        {free_bytes(folder) / 2**30:.2f} GiB at {folder}",
        ]
        if self.workers > 1:
            lines.append(
                f"assumed          each of {self.workers} workers is as fast as one alone, given a core or GPU"
            )
        return lines


def record_bytes(record: Record) -> int:
    """Bytes of a record in its shard and in the table: two members of a tar, and one row for each state."""
    members = sum(TAR_BLOCK + -(-len(member) // TAR_BLOCK) * TAR_BLOCK for member in encode(record))
    sides = 0 if record.size is None else 4 + 4
    row = 8 + 1 + 2 + 8 + 4 + 4 + sides + sum(values[0].nbytes for values in record.features.by_block.values())
    return members + len(record.states) * row


def blank_record(teacher: Teacher, state_count: int, size: PictureSize, windows: int | None = None) -> Record:
    """A record of the shapes that this teacher gives at a size, for `record_bytes`."""
    parts, latent = teacher.components, teacher.components.latent_shape(size)
    cond = torch.zeros(parts.tokenizer.model_max_length, parts.unet.config["cross_attention_dim"]).half()
    states = torch.zeros(state_count, *latent).half()
    k, kept = torch.zeros(state_count, dtype=torch.int64), torch.zeros(state_count, dtype=torch.bool)
    features = {block: torch.zeros(state_count, width).half() for block, width in feature_widths(parts.unet).items()}
    stacked = States(k, torch.zeros(state_count), states, states, states, kept)
    landings = None
    if windows:
        times = landing_times(windows).float()
        landings = Landings(times, states[:1].repeat(len(times), 1, 1, 1))
    head = ("0" * 9, " " * 80, "class/name", 0, 0.0)
    return Record(*head, cond, states[0], stacked, BlockFeatures(features), size, landings)


def estimate_cost(make: RecordMaker, tasks: Sequence[ShardTask], workers: int, capacity: int) -> Cost:
    """The cost of these shards, from making the first batch of each size twice: the first time warms the device up.

    The time is that of the whole command. Its start is as long as this process has run, and each worker starts after
    it. The last worker to end decides: it has whole shards to make; beyond `capacity`, workers wait for each other.
    """
    start = (time.time() - psutil.Process().create_time()) * (1 if workers == 1 else 2)
    by_size: dict[PictureSize, list[ShardTask]] = {}
    for task in tasks:
        by_size.setdefault(task.size, []).append(task)
    costs, states = [], 0
    for size, of_size in by_size.items():
        longest = max(of_size, key=lambda task: len(task.prompts))
        records, seconds = time_batch(make, longest)
        prompts = count_prompts(of_size)
        states += prompts * len(records[0].states)
        stored = sum(record_bytes(record) for record in records) / len(records)
        costs.append(SizeCost(size, prompts, round(prompts * stored), seconds))
    seconds_of = {cost.size: cost.seconds_per_prompt for cost in costs}
    last = longest_share([len(task.prompts) * seconds_of[task.size] for task in tasks], workers)
    return Cost(tuple(costs), states, start, last * max(1.0, workers / capacity), peak_memory(), workers)


def time_batch(make: RecordMaker, task: ShardTask) -> tuple[list[Record], float]:
    """The records of a task's first batch, made twice, and the seconds of each prompt at the second time."""
    sample = task.prompts[: task.batch_size]
    keys = [f"{number:09d}" for number in task.numbers[: task.batch_size]]
    make(sample, keys, task.size)
    began = time.perf_counter()
    records = make(sample, keys, task.size)
    return records, (time.perf_counter() - began) / len(sample)


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refuse_small_disk(folder: Path, needed: int) -> None:
    """Raise `Refused` unless `needed` bytes and a margin fit."""
    free = free_bytes(folder)
    if free < needed + MARGIN_BYTES:
        raise Refused(
            f"{folder}: {free / 2**20:,.0f} MiB free, {(needed + MARGIN_BYTES) / 2**20:,.0f} MiB are needed - "
            "free some space, choose another run folder, or say --no-disk-check true; the same command goes on"
        )
