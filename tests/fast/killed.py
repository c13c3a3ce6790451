"""Trainings for few steps, left alone, killed at every boundary, shared by two: `python -m tests.fast.killed DIR`.

They are forked from a process that has imported everything and computed nothing, which autograd does not survive.
"""

import importlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.killing import incomplete_files, read_files
from stages import __main__ as program
from tests.convert.runs import fork

TEACHER = ["--teacher", "tests/golden/data/teacher"]
"""Of 8 channels."""
CONFIG = ["--config", "configs/tiny.yaml"]
CACHE = ["cache-teacher", *CONFIG, *TEACHER, "--count", "8", "--validation-count", "4"]
CACHE += ["--render.records-per-shard", "4", "--render.states.steps", "4"]
GRID = ["--grid.prompts", "a purple heart", "--grid.sampler.steps", "2"]
DISTILL = ["distill", *CONFIG, *GRID, "--train.max-samples", "4", "--train.batch-size", "4", "--validation.states", "0"]
DISTILL += ["--david.fusion.formula", "static"]
FAST = ["distill", *CONFIG, *GRID, "--fast.train.max-samples", "20", "--fast.train.batch-size", "4"]
FAST += ["--fast.train.checkpoint-every-samples", "8", "--fast.train.journal-every-samples", "4"]
FAST += ["--fast.train.optimizer.warmup-samples", "4", "--fast.validation-states", "6", "--windows", "4", "2", "1"]
SHARDS = {
    "the first landings": ("stages.cache.targets", "stack_landings", 1),
    "the second shard": ("shards.writer", "write_shard", 2),
    "the last landings": ("stages.cache.targets", "stack_landings", 2),
}
MOMENTS = {
    "the settings": ("stages.fast.phase", "save_settings", 1),
    "the fourth step": ("stages.train.step", "learning_rate", 4),
    "the last grid": ("stages.fast.grids", "save_sheet", 2),
    "the export": ("stages.fast.phase", "export_all", 1),
    "the single file": ("stages.export", "export_ldm", 1),
    "the mark": ("stages.fast.phase", "atomic_write", 2),
    "the next student": ("stages.fast.phase", "embed_guidance", 3),
    "its third step": ("stages.train.step", "learning_rate", 3),
    "its export": ("stages.fast.phase", "export_all", 2),
    "the last student": ("stages.fast.phase", "save_settings", 3),
}
"""What is about to begin -> the function whose call with this number, from the command's start on, does not return."""


def call(*words: str) -> int:
    """A command, in this process; its exit code."""
    try:
        return program.main(list(words))
    except SystemExit as left:
        return int(left.code or 0)


def main(folder: Path) -> None:
    """Make the runs, and write down how each call ended and what was half done after it."""
    torch.set_num_threads(1)
    for module in ("stages.distill", "stages.cache_teacher"):
        importlib.import_module(module)
    whole, killed = folder / "whole" / "run", folder / "killed" / "run"
    ends: dict[str, object] = {"cache": fork(partial(call, *CACHE, "--run", str(whole)))}
    expected = read_files(whole / "cache")
    for moment, at in SHARDS.items():
        ends[moment] = fork(partial(call, *CACHE, "--run", str(killed)), *at)
        ends[f"half done before {moment}"] = incomplete_files(killed / "cache", expected)
    ends["cache, killed"] = fork(partial(call, *CACHE, "--run", str(killed)))
    ends["same cache"] = read_files(killed / "cache") == expected

    ends["distill"] = fork(partial(call, *DISTILL, "--run", str(whole)))
    shutil.copytree(whole / "distill", killed / "distill")
    ends["whole"] = fork(partial(call, *FAST, "--run", str(whole)))
    for moment, at in MOMENTS.items():
        ends[moment] = fork(partial(call, *FAST, "--run", str(killed)), *at)
    ends["killed"] = fork(partial(call, *FAST, "--run", str(killed)))
    shared = folder / "shared" / "run"
    for part in ("cache", "distill"):
        shutil.copytree(whole / part, shared / part)
    ends["shared"] = fork(partial(call, *FAST, "--run", str(shared), "--processes", "2"))
    ends["again"] = fork(partial(call, *FAST, "--run", str(whole)))
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
