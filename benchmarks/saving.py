"""A process that does nothing but save checkpoints, and what must be true of them when it dies or the disk fails it."""

import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.killing import fork_job, kill_after, kill_before_step, wait_for_exit
from stages.system.refusal import Refused
from stages.train.checkpoint import Checkpoints
from stages.train.checkpoint_store import KeepConfig, checkpoints_to_keep, fault_of
from stages.train.ema import Ema
from stages.train.optim import OptimizerConfig, build_optimizer
from stages.train.state import TrainingState

KEEP = KeepConfig(last=2, every_samples=50)
STEP = 8
IDENTITY = {"job": "saving"}


def state_at(samples: int, width: int) -> TrainingState:
    """A state whose every weight follows from the number of samples."""
    module = nn.Linear(width, width, bias=False)
    state = TrainingState(module, Ema(module), build_optimizer(OptimizerConfig(), dict(module.named_parameters())))
    generator = torch.Generator().manual_seed(samples)
    module.weight.grad = torch.randn(width, width, generator=generator)
    state.optimizer.step()
    with torch.no_grad():
        module.weight.copy_(torch.randn(width, width, generator=generator))
    state.ema.update(0.0)
    state.samples = samples
    return state


def score_at(samples: int) -> float | None:
    """An error that wanders, and that is not always measured."""
    rng = random.Random(samples)
    return None if rng.random() < 0.3 else rng.random()


def save_repeatedly(folder: Path, completed_file: Path, until: int, width: int = 8) -> None:
    """Go on from what lies in a folder, and save one checkpoint after another; `returned` lists those that are done."""
    checkpoints = Checkpoints(folder, IDENTITY, KEEP)
    state = state_at(0, width)
    checkpoints.restore(state)
    for samples in range(state.samples + STEP, until + 1, STEP):
        checkpoints.save(state_at(samples, width), score_at(samples))
        with open(completed_file, "a") as done:
            done.write(f"{samples}\n")


def find_errors(folder: Path, at_least: int, width: int = 8) -> list[str]:
    """What is wrong in a folder whose process died when checkpoints up to `at_least` were done."""
    state, wrong = (
        state_at(0, width),
        [f"{path.name}: {fault}" for path in list_checkpoints(folder) if (fault := fault_of(path))],
    )
    if Checkpoints(folder, IDENTITY, KEEP).restore(state) is None:
        return wrong if at_least == 0 else [*wrong, "nothing was restored"]
    if state.samples < at_least:
        wrong.append(f"{state.samples} was restored, {at_least} was done")
    if not states_equal(state, state_at(state.samples, width)):
        wrong.append(f"{state.samples} came back with other weights")
    saved = {samples: score_at(samples) for samples in range(STEP, state.samples + 1, STEP)}
    here = {int(path.name) for path in list_checkpoints(folder)}
    if lost := checkpoints_to_keep(saved, KEEP) - here:
        wrong.append(f"{sorted(lost)} had to stay")
    return wrong + [f"{path.name} was left" for path in folder.glob(".*")]


def states_equal(one: TrainingState, other: TrainingState) -> bool:
    """Whether weights, average and moments are equal to the last bit."""
    pairs = [(one.student.state_dict(), other.student.state_dict()), (one.ema.tensors(), other.ema.tensors())]
    pairs.append((one.optimizer.state_dict()["state"][0], other.optimizer.state_dict()["state"][0]))
    return all(torch.equal(mine[name], yours[name]) for mine, yours in pairs for name in yours)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names."""
    return sorted(folder.glob("[0-9]*"))


def last_completed(completed_file: Path) -> int:
    """The last checkpoint whose `save` had returned."""
    lines = completed_file.read_text().split() if completed_file.exists() else []
    return int(lines[-1]) if lines else 0


def kill_and_check(folder: Path, seconds: float, width: int) -> list[str]:
    """Let the process go on, kill it after a time; what is wrong then."""
    returned = folder.with_suffix(".returned")
    if not kill_after(lambda: save_repeatedly(folder, returned, 10**8, width), seconds):
        return ["it ended by itself"]
    return find_errors(folder, last_completed(returned), width)


def kill_at_each_step(folder: Path, until: int, steps: range) -> tuple[int, list[str]]:
    """Kill it before each of these steps on the disk; how many there were, and what was wrong."""
    wrong, met = list[str](), 0
    for step in steps:
        here, returned = folder / f"step{step}", folder / f"step{step}.returned"
        here.mkdir(parents=True)
        if not kill_before_step(lambda: save_repeatedly(here, returned, until), step):  # noqa: B023
            break
        met += 1
        wrong += [f"step {step}: {slip}" for slip in find_errors(here, last_completed(returned))]
        shutil.rmtree(here)
    return met, wrong


def damage_and_check(folder: Path, file: str, change: Callable[[bytes], bytes], width: int = 8) -> list[str]:
    """Change a file of the newest of a folder's checkpoints; what is wrong with the one that is restored then."""
    *_, before, newest = list_checkpoints(folder)
    whole = (newest / file).read_bytes()
    (newest / file).write_bytes(change(whole))
    state = state_at(0, width)
    restored = Checkpoints(folder, IDENTITY, KEEP).restore(state)
    right = restored == before and states_equal(state, state_at(int(before.name), width))
    stayed = (newest / file).exists()
    (newest / file).write_bytes(whole)
    return [] if right and stayed else [f"{file}: {restored} was restored"]


def flip_bit(bit: int) -> Callable[[bytes], bytes]:
    """The act of changing one bit."""
    return lambda b: b[: bit // 8] + bytes([b[bit // 8] ^ 1 << bit % 8]) + b[bit // 8 + 1 :]


def truncate_before_bit(bit: int) -> Callable[[bytes], bytes]:
    """The act of cutting a file before the byte that holds a bit."""
    return lambda b: b[: bit // 8]


def fill_disk_and_check(folder: Path, bytes_a_file: int, width: int = 8) -> list[str]:
    """Save once more where no file may grow beyond a size; what is wrong then."""
    before, samples = list_checkpoints(folder), int(list_checkpoints(folder)[-1].name)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
        try:
            Checkpoints(folder, IDENTITY, KEEP).save(state_at(samples + STEP, width), score_at(samples + STEP))
        except Refused:
            return
        raise RuntimeError("it fitted")

    wrong = ["the save was not refused"] if wait_for_exit(fork_job(full)) else []
    left = [path.name for path in folder.glob(".*")]
    return (
        wrong
        + left
        + find_errors(folder, samples, width)
        + ([] if list_checkpoints(folder) == before else ["others are there"])
    )
