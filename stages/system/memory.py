"""How many processes this machine holds: refused before any of them is started."""

import os
from pathlib import Path

import psutil
import torch

from stages.system.refusal import Refused

GIB = 2**30
MOST_PER_CORE = 2
"""Each process computes on one thread: more than two for each core only wait for one another."""
CGROUP = Path("/sys/fs/cgroup")
CONTAINERS = (
    ("memory.max", "memory.current", ("memory.stat", "file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("memory/memory.stat", "cache")),
)
"""Files of a container's limit, of what it takes, and of the files that it read, in cgroups 2 and 1."""


def refuse_too_many(option: str, count: int, bytes_each: int, device: torch.device) -> None:
    """Raise `Refused` unless this machine has GPUs, or else cores and memory, for so many processes.

    `bytes_each` is what one holds beyond the libraries; these weigh as much there as they do in this process.
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
        way_out = f"take {fitting} at most" if fitting else "free some memory, or take a larger machine"
        raise Refused(
            f"{option} = {count}: about {count * each / GIB:.1f} GiB of memory for all of them, {each / GIB:.1f} each, "
            f"and {free / GIB:.1f} GiB are free - {way_out}"
        )


def available_bytes() -> int:
    """Memory that this process and its children may still take: of the machine, and of the container around it."""
    free = int(psutil.virtual_memory().available)
    for limit, used, kept in CONTAINERS:
        try:
            most, taken = (int((CGROUP / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = dict(line.split() for line in (CGROUP / kept[0]).read_text(encoding="ascii").splitlines())
            free = min(free, max(0, most - taken + int(stat[kept[1]])))  # read files are given back when room is needed
        except (OSError, ValueError, KeyError):  # no such container, or one without a limit ("max")
            continue
    return free


def own_bytes() -> int:
    """Memory that this process shares with no other: the libraries' own, as long as nothing else is loaded."""
    process = psutil.Process()
    try:
        return int(process.memory_full_info().uss)
    except (psutil.AccessDenied, AttributeError):
        return int(process.memory_info().rss)
