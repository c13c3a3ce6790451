"""Conversions of a narrow fine-tune, one left alone, one killed at every boundary: `python -m tests.convert.runs DIR`.

They are forked from a process that has imported everything and computed nothing, which autograd does not survive.
"""

import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.killing import fork_job, wait_for_exit
from stages import __main__ as program

GOLDEN = Path("tests/golden/data")
"""A run with its teacher, of 8 channels."""
SMALL = ["--config", "configs/tiny.yaml", "--count", "6", "--validation-count", "2", "--probe.prompts", "2"]
SMALL += ["--probe.sampler.steps", "2", "--verdict.prompts", "2", "--verdict.steps", "1", "2"]
SMALL += ["--train.max-samples", "20", "--train.batch-size", "4", "--train.checkpoint-every-samples", "8"]
SMALL += ["--train.journal-every-samples", "4", "--train.optimizer.warmup-samples", "4", "--validation.states", "6"]
SMALL += ["--render.records-per-shard", "4", "--render.states.steps", "4", "--grid.sampler.steps", "2"]
MOMENTS = {
    "the cache": ("stages.convert.command", "make_cache", 1),
    "the second shard": ("shards.writer", "write_shard", 2),
    "the polish": ("stages.convert.command", "polish", 1),
    "the fourth step": ("stages.train.step", "learning_rate", 4),
    "the verdict": ("stages.convert.command", "measure_verdict", 1),
    "the export": ("stages.convert.command", "export_all", 1),
    "the single file": ("stages.export", "export_ldm", 1),
    "the mark": ("stages.convert.command", "atomic_write", 1),
}
"""What is about to begin -> the function whose call with this number does not return."""


def make_fine_tune(folder: Path) -> Path:
    """The narrow teacher with noise on its UNet's matrices."""
    shutil.copytree(GOLDEN / "teacher", folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.1 * value.std() * torch.randn(value.shape, generator=generator) if value.ndim > 1 else value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    return folder


def convert(fine_tune: Path, out: Path, *words: str) -> int:
    """The command, in this process; its exit code."""
    try:
        return program.main(["convert", str(fine_tune), "--base", str(GOLDEN), "--out", str(out), *SMALL, *words])
    except SystemExit as left:  # how a signal ends training
        return int(left.code or 0)


def signal_at(module: str, name: str, call: int, number: int) -> None:
    """Let this process get a signal at the n-th call of a function."""
    owner = importlib.import_module(module)
    original, calls = getattr(owner, name), 0

    def call_or_signal(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, call_or_signal)


def fork(act: Callable[[], int], *at: object, number: int = signal.SIGKILL) -> int:
    """How a forked call ends: its exit code, or minus the signal that killed it."""

    def job() -> None:
        if at:
            signal_at(*at, number)  # type: ignore[arg-type]
        code = act()
        sys.stdout.flush()
        os._exit(code)

    return wait_for_exit(fork_job(job))


def main(folder: Path) -> None:
    """Make the runs, and print how each call ended."""
    torch.set_num_threads(1)
    importlib.import_module("stages.convert.command")
    fine_tune = make_fine_tune(folder / "fine-tune")
    ends: dict[str, int] = {"whole": fork(partial(convert, fine_tune, folder / "whole"))}
    for moment, at in MOMENTS.items():
        ends[moment] = fork(partial(convert, fine_tune, folder / "killed"), *at)
    ends["killed"] = fork(partial(convert, fine_tune, folder / "killed"))
    ends["again"] = fork(partial(convert, fine_tune, folder / "whole"))
    ends["other settings"] = fork(partial(convert, fine_tune, folder / "whole", "--verdict.prompts", "3"))
    gated = partial(convert, fine_tune, folder / "gated", "--gate", "100")
    # The second step reaches the first checkpoint: its score is not measured when a signal comes there.
    ends["gate, stopped"] = fork(gated, "stages.train.step", "learning_rate", 2, number=signal.SIGTERM)
    ends["gate"] = fork(gated)
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
