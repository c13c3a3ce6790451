"""What a cache will cost, told before it is made; and the disk watched while it is."""

import heapq
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from shards.codec import encode
from shards.record import BlockFeatures, Record, States
from stages.nets.features import feature_widths
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.system.disk import free_bytes
from stages.system.refusal import Refused

RecordMaker = Callable[[Sequence[Prompt], Sequence[str]], list[Record]]

TAR_BLOCK = 512
MARGIN_BYTES = 16 << 20
"""Left free for the manifest, its journal and whatever else writes to the same disk."""


@dataclass(frozen=True)
class Cost:
    """What the missing part of a cache takes."""

    prompts: int
    states: int
    bytes: int
    start_seconds: float
    seconds: float
    peak_bytes: int
    workers: int

    def lines(self, folder: Path) -> list[str]:
        """The same for a person."""
        whole = self.start_seconds + self.seconds
        said = [
            f"prompts to make  {self.prompts:,} ({self.states:,} states)",
            f"bytes            {self.bytes:,} ({self.bytes / 2**30:.2f} GiB)",
            f"time             {whole / 3600:.2f} hours, if it stays as busy here as it is now "
            f"({whole:.0f} s from start to end, {self.start_seconds:.0f} of them to start)",
            f"peak memory      {self.workers * self.peak_bytes / 2**30:.2f} GiB",
            f"free disk        {free_bytes(folder) / 2**30:.2f} GiB at {folder}",
        ]
        if self.workers > 1:
            said.append(f"assumed          each of {self.workers} workers is as fast as one alone, given a core or GPU")
        return said


def record_bytes(record: Record) -> int:
    """What a record takes in its shard and in the table, in bytes: two members of a tar, and one row a draw."""
    members = sum(TAR_BLOCK + -(-len(member) // TAR_BLOCK) * TAR_BLOCK for member in encode(record))
    row = 8 + 1 + 2 + 8 + 4 + 4
    return members + sum(row + sum(v[0].nbytes for v in record.features.by_block.values()) for _ in record.states.k)


def blank_record(teacher: Teacher, state_count: int) -> Record:
    """A record of the shapes that this teacher will give, to be weighed."""
    parts, latent = teacher.components, teacher.components.latent_shape
    cond = torch.zeros(parts.tokenizer.model_max_length, parts.unet.config["cross_attention_dim"]).half()
    states = torch.zeros(state_count, *latent).half()
    k, kept = torch.zeros(state_count, dtype=torch.int64), torch.zeros(state_count, dtype=torch.bool)
    features = {block: torch.zeros(state_count, width).half() for block, width in feature_widths(parts.unet).items()}
    held = States(k, torch.zeros(state_count), states, states, states, kept)
    return Record("0" * 9, " " * 80, "class/name", 0, 0.0, cond, states[0], held, BlockFeatures(features))


def estimate_cost(
    make: RecordMaker, sample: Sequence[Prompt], shards: Sequence[int], workers: int, capacity: int
) -> Cost:
    """The cost of shards of so many prompts each, from making a sample twice: the first time warms the device up.

    The time is that of the whole command. Its start is as long as this process took until now, and each worker starts
    after it. The last worker to end decides: it has whole shards to make; more workers than places wait for each other.
    """
    began = time.time() - psutil.Process().create_time()
    keys = [f"{i:09d}" for i in range(len(sample))]
    make(sample, keys)
    at = time.perf_counter()
    records = make(sample, keys)
    seconds = (time.perf_counter() - at) / len(sample)
    each = [record_bytes(record) for record in records]
    prompts = sum(shards)
    draws, size = (sum(values) / len(sample) for values in ((len(record.states) for record in records), each))
    longest = longest_share(shards, workers) * max(1.0, workers / capacity)
    start = began if workers == 1 else 2 * began
    return Cost(
        prompts, round(draws * prompts), round(size * prompts), start, seconds * longest, peak_memory(), workers
    )


def longest_share(shards: Sequence[int], workers: int) -> int:
    """Prompts of the worker that ends last, when each takes the next shard as soon as it is free."""
    shares = [0] * workers
    for prompts in shards:
        heapq.heapreplace(shares, shares[0] + prompts)
    return max(shares)


def worker_capacity() -> int:
    """How many workers of one thread this machine runs side by side."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory that was held at a time, in bytes: the GPU's where there is one, else the process's."""
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


def with_disk_check(make: RecordMaker, folder: Path, shard_bytes: int) -> RecordMaker:
    """`make`, which stops cleanly while there is still room for what is being written."""

    def made(prompts: Sequence[Prompt], keys: Sequence[str]) -> list[Record]:
        refuse_small_disk(folder, shard_bytes)
        return make(prompts, keys)

    return made
