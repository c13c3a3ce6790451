"""Killing a process that fills a cache, by the clock or before its n-th step on the disk, and what may be left then."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import forge
from configs.values import PictureSize
from shards.manifest import Manifest, Recipe
from shards.record import Record
from shards.table import write_table
from shards.writer import CacheWriter
from stages.cache.fill import fill, tasks_of
from stages.cache.sizes import RenderSizes
from stages.prompts import Prompt

STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
"""Events of Python's audit that change a folder, beside an `open` for writing; each is raised before it happens."""


def fill_small_cache(cache: Path, prompt_count: int = 8) -> None:
    """Fill a cache as cache-teacher does, with records that cost nothing."""

    def make(_prompts: Sequence[Prompt], keys: Sequence[str], _size: PictureSize) -> list[Record]:
        return [forge.record(int(key)) for key in keys]

    prompts = [Prompt(f"star {number}", "star", number) for number in range(prompt_count)]
    writer = CacheWriter(cache, Recipe(identity={"steps": 2}))
    tasks = tasks_of({"train": prompts, "validation": prompts[:2]}, 2, 2, RenderSizes(PictureSize(64, 64)))
    fill(writer, tasks, make)
    write_table(cache)


def fork_job(job: Callable[[], None]) -> int:
    """The process that does a job, with all that is imported here already."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        job()
        code = 0
    finally:
        os._exit(code)


def wait_for_exit(pid: int) -> int:
    """How a process ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(job: Callable[[], None], seconds: float) -> bool:
    """Do a job, and kill it after a time; False when it was done before."""
    pid = fork_job(job)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return wait_for_exit(pid) == -signal.SIGKILL


def kill_before_step(job: Callable[[], None], step: int) -> bool:
    """Do a job, and kill it before its step on the disk with this number, from 0; False when it takes fewer."""

    def until_then() -> None:
        count = 0

        def on_event(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in STEPS or (
                event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(on_event)
        job()

    code = wait_for_exit(fork_job(until_then))
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the job failed by itself: {code}")
    return code != 0


def read_files(cache: Path) -> dict[str, bytes]:
    """Every file of a cache under its final name, with its bytes; what was moved aside does not count."""
    files = {str(path.relative_to(cache)): path for path in cache.rglob("*") if path.is_file()}
    hidden = {file for file in files if any(part.startswith(".") or part == "quarantine" for part in Path(file).parts)}
    return {file: files[file].read_bytes() for file in sorted(files.keys() - hidden)}


def incomplete_files(cache: Path, expected_files: dict[str, bytes]) -> list[str]:
    """Each file under its final name that is not what an uninterrupted run leaves there.

    The manifest grows: it must name shards of the whole one only, and each of those must be there.
    """
    present = read_files(cache)
    wrong = [file for file in present if file != "manifest.json" and present[file] != expected_files.get(file)]
    tables = [{file for file in files if file.startswith("table.zarr")} for files in (present, expected_files)]
    wrong += ["table.zarr"] * (tables[0] not in (set(), tables[1]))
    if "manifest.json" in present:
        shards = set(Manifest.parse(expected_files["manifest.json"], cache).shards)
        here = Manifest.open(cache).shards
        wrong += [shard.file for shard in here if shard not in shards or shard.file not in present]
    return wrong


def leftovers_text(cache: Path) -> str:
    """What a killed process left, in words."""
    names = [path.name for path in (*cache.glob("*"), *cache.glob("*/.*"), *cache.glob("data/*.tar"))]
    shards, partial = sum(name.endswith(".tar") for name in names), sum(name.endswith(".partial") for name in names)
    claims = len([path for path in cache.glob(".claims/*") if not path.name.startswith(".")])
    table = "a table" if "table.zarr" in names else "no table"
    return f"{shards} shards, {partial} unfinished, {claims} dead claims, {table}"
