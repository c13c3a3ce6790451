"""The cost of a cache before it is made, and the free disk space before and while it is."""

import heapq
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from shards.codec import encode
from shards.record import BlockFeatures, Record, States
from stages.cache.fill import RecordMaker
from stages.nets.features import feature_widths
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.system.disk import free_bytes
from stages.system.refusal import Refused

TAR_BLOCK = 512
MARGIN_BYTES = 16 << 20
"""Left free for the manifest, its journal and other programs on the same disk."""


@dataclass(frozen=True)
class Cost:
    """The cost of the missing part of a cache."""

    prompts: int
    states: int
    bytes: int
    start_seconds: float
    seconds: float
    peak_bytes: int
    workers: int

    def lines(self, folder: Path) -> list[str]:
        """The cost as text."""
        whole = self.start_seconds + self.seconds
        lines = [
            f"prompts to make  {self.prompts:,} ({self.states:,} states)",
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
    row = 8 + 1 + 2 + 8 + 4 + 4 + sum(values[0].nbytes for values in record.features.by_block.values())
    return members + len(record.states) * row


def blank_record(teacher: Teacher, state_count: int) -> Record:
    """A record of the shapes that this teacher gives, for `record_bytes`."""
    parts, latent = teacher.components, teacher.components.latent_shape
    cond = torch.zeros(parts.tokenizer.model_max_length, parts.unet.config["cross_attention_dim"]).half()
    states = torch.zeros(state_count, *latent).half()
    k, kept = torch.zeros(state_count, dtype=torch.int64), torch.zeros(state_count, dtype=torch.bool)
    features = {block: torch.zeros(state_count, width).half() for block, width in feature_widths(parts.unet).items()}
    stacked = States(k, torch.zeros(state_count), states, states, states, kept)
    return Record("0" * 9, " " * 80, "class/name", 0, 0.0, cond, states[0], stacked, BlockFeatures(features))


def estimate_cost(
    make: RecordMaker, sample: Sequence[Prompt], shards: Sequence[int], workers: int, capacity: int
) -> Cost:
    """The cost of shards of so many prompts each, from making a sample twice: the first time warms the device up.

    The time is that of the whole command. Its start is as long as this process has run, and each worker starts after
    it. The last worker to end decides: it has whole shards to make; beyond `capacity`, workers wait for each other.
    """
    start = (time.time() - psutil.Process().create_time()) * (1 if workers == 1 else 2)
    keys = [f"{i:09d}" for i in range(len(sample))]
    make(sample, keys)
    began = time.perf_counter()
    records = make(sample, keys)
    seconds = (time.perf_counter() - began) / len(sample)
    prompts, longest = sum(shards), longest_share(shards, workers) * max(1.0, workers / capacity)
    states = prompts * sum(len(record.states) for record in records) / len(sample)
    size = prompts * sum(record_bytes(record) for record in records) / len(sample)
    return Cost(prompts, round(states), round(size), start, seconds * longest, peak_memory(), workers)


def longest_share(shards: Sequence[int], workers: int) -> int:
    """Prompts of the worker that ends last, if each takes the next shard as soon as it is free."""
    shares = [0] * workers
    for prompts in shards:
        heapq.heapreplace(shares, shares[0] + prompts)
    return max(shares)


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
