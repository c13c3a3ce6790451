"""How many processes this machine can run by its cores and its memory."""

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from stages.system.refusal import Refused

GIB = 2**30
MOST_PER_CORE = 2
"""Processes: each computes on one thread, and more than two for each core only wait for one another."""
CGROUP = Path("/sys/fs/cgroup")
CONTAINERS = (
    ("memory.max", "memory.current", ("memory.stat", "file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("memory/memory.stat", "cache")),
)
"""Files with a container's limit, its use, and the page cache in that, for cgroups 2 and 1; all in bytes."""


def refuse_too_many(option: str, count: int, bytes_each: int, device: torch.device) -> None:
    """Raise `Refused` unless this machine has a GPU, or else cores and memory, for `count` processes.

    `bytes_each` is the memory of one beyond the libraries, whose share is measured in this process.
    """
    if device.type == "cuda":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count > MOST_PER_CORE * cores:
        raise Refused(
            f"{option} = {count}: {cores} cores compute here, more than {MOST_PER_CORE} processes for each only wait - "
            f"take {cores}, or {MOST_PER_CORE * cores} at most"
        )
    each, free = bytes_each + own_bytes(), available_bytes()
    if count * each > free:
        fitting = free // each
        hint = f"take {fitting} at most" if fitting else "free some memory, or take a larger machine"
        raise Refused(
            f"{option} = {count}: about {count * each / GIB:.1f} GiB of memory for all of them, {each / GIB:.1f} each, "
            f"and {free / GIB:.1f} GiB are free - {hint}"
        )


def available_bytes() -> int:
    """Memory that this process and its children may still use: of the machine, and of its container."""
    free = int(psutil.virtual_memory().available)
    for limit_file, used_file, (stat_file, cache_key) in CONTAINERS:
        # Suppressed: no such container, or one without a limit ("max").
        with suppress(OSError, ValueError, KeyError):
            limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in (limit_file, used_file))
            stat = dict(line.split() for line in (CGROUP / stat_file).read_text(encoding="ascii").splitlines())
            free = min(free, max(0, limit - used + int(stat[cache_key])))  # the page cache is freed when needed
    return free


def own_bytes() -> int:
    """Memory that only this process uses: that of the libraries, as long as nothing else is loaded."""
    process = psutil.Process()
    try:
        return int(process.memory_full_info().uss)
    except (psutil.AccessDenied, AttributeError):
        return int(process.memory_info().rss)
