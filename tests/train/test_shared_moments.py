"""Processes that share the optimizer's moments train to the same bits as those that keep all of them."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.batch import Batch
from stages.train import loop, optim
from stages.train.loop import fit
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.optimizers.partition import Partition, ProcessGroup
from stages.train.runtime import Runtime
from tests.train.conftest import BLOCKS, CONFIG, SCALE, Toy, make_batch
from tests.train.test_david import run_processes

BATCH, LAST, SAVED = 4, 32, 8
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw"},
    "balanced": {"kind": "adamw", "block_rates": "balanced"},
    "muon": {"kind": "muon", "block_rates": {"mid": 0.5}},
}


class Blocks(Toy):
    """The toy with matrices of many sizes in a block, one of them in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 7, 1), nn.Tanh(), nn.Conv2d(7, 3, 3, padding=1)
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in self.mid_block.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 5
        weight = self.mid_block[4].weight
        weight.data = weight.data.to(memory_format=torch.channels_last)

    def velocity(self, x: Tensor, s: Tensor, cond: Tensor) -> Tensor:
        return super().velocity(x, s, cond) + self.mid_block(x)


def train(folder: Path, optimizer: dict[str, Any], shard: bool, kill_at: int | None = None) -> None:
    """Train the toy; each process writes the bytes of its moments at the end. Process 0 is killed at a sample."""
    runtime, true = Runtime(torch.device("cpu")), loop.initial_state
    states = []

    def recording(*arguments: Any) -> Any:
        states.append(true(*arguments))
        return states[0]

    def batches(first: int) -> Iterator[Batch]:
        for number in range(first, 10**6, BATCH):
            if number == kill_at and runtime.is_main:
                signal.raise_signal(signal.SIGKILL)
            yield make_batch(number, BATCH).rows(slice(runtime.rank, None, runtime.world))

    loop.initial_state = recording  # of a forked process
    optim.REBALANCE_EVERY_SAMPLES = 8
    changes = {"batch_size": BATCH, "max_samples": LAST, "checkpoint_every_samples": SAVED, "shard_moments": shard}
    changes["optimizer"] = {**CONFIG.optimizer.model_dump(), **optimizer}
    fit(
        Blocks(),  # type: ignore[arg-type]
        Objective(ObjectiveConfig(), BLOCKS, SCALE),
        batches,
        torch.zeros(1, 5, 6),
        type(CONFIG).model_validate({**CONFIG.model_dump(), **changes}),
        folder,
        runtime=runtime,
        identity={},
    )
    held = states[0].optimizer
    parts = getattr(held, "optimizers", {"": held}).values()
    moments = [value for part in parts for state in part.state.values() for name, value in state.items()]
    size = sum(value.nbytes for value in moments if value.ndim)
    (folder / f"moments-{runtime.world}-{runtime.rank}").write_text(json.dumps(size))
    runtime.close()


def checkpoint(folder: Path, samples: int = LAST) -> Path:
    return folder / "checkpoints" / f"{samples:09d}"


def weights(folder: Path) -> list[str]:
    """The hashes of the last weights and their average."""
    files = json.loads((checkpoint(folder) / "state.json").read_text())["files"]
    return [files["student.safetensors"], files["ema.safetensors"]]


def assert_same(one: Any, other: Any) -> None:
    """Whether two states of an optimizer have the same values, types and layouts, in any order."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Tensor):
        assert (one.dtype, one.device, one.stride()) == (other.dtype, other.device, other.stride())
        assert torch.equal(one, other)
    else:
        assert one == other


def moments(folder: Path) -> Any:
    return torch.load(checkpoint(folder) / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_that_share_the_moments_end_on_the_bits_of_two_that_do_not(tmp_path: Path, name: str) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    for folder in (whole, shared):
        assert run_processes(partial(train, folder, OPTIMIZERS[name], folder == shared), 2) == [0, 0]
    assert weights(whole) == weights(shared)
    assert_same(moments(whole), moments(shared))

    content = moments(shared)
    states = [part["state"] for part in (content.values() if name == "muon" else [content])]
    sizes = [value.nbytes for state in states for held in state.values() for value in held.values() if value.ndim]
    largest = 2 * max(parameter.nbytes for parameter in Blocks().parameters())
    held = [json.loads((shared / f"moments-2-{rank}").read_text()) for rank in range(2)]
    assert sum(held) == sum(sizes)
    assert max(held) <= sum(sizes) / 2 + largest
    assert min(held) > 0


def train_through(folder: Path, optimizer: dict[str, Any], stages: list[tuple[int, bool]]) -> None:
    """Train with these numbers of processes, sharing moments or not; each ends in a kill after one more checkpoint."""
    for number, (world, shard) in enumerate(stages):
        kill_at = (number + 1) * SAVED + BATCH if number + 1 < len(stages) else None
        codes = run_processes(partial(train, folder, optimizer, shard, kill_at=kill_at), world)
        assert (codes == [0] * world) if kill_at is None else (0 not in codes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_of_one_two_and_one_process_may_share_its_moments_at_any_time(tmp_path: Path, name: str) -> None:
    whole, changing, one = tmp_path / "whole", tmp_path / "changing", tmp_path / "one"
    train_through(whole, OPTIMIZERS[name], [(1, False), (2, False), (2, False), (1, False)])
    train_through(changing, OPTIMIZERS[name], [(1, True), (2, True), (2, False), (1, True)])
    assert weights(whole) == weights(changing)
    assert_same(moments(whole), moments(changing))
    if name == "muon":  # whose momenta are shared in any case
        train_through(one, OPTIMIZERS[name], [(1, False)])
        single, several = (load_file(checkpoint(folder) / "student.safetensors") for folder in (one, whole))
        assert all(torch.allclose(several[key], value, atol=1e-5) for key, value in single.items())


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 2)), max_size=30), st.integers(1, 6))
def test_each_moment_is_kept_once_and_no_process_keeps_more_than_the_mean_and_the_largest(
    sizes: list[tuple[int, int]], world: int
) -> None:
    group = ProcessGroup()
    group.world = world
    partition = Partition(group)
    parameters = [torch.empty(size) for size, _ in sizes]
    for parameter, (_, count) in zip(parameters, sizes, strict=True):
        partition.add([parameter], count)
    held = [0] * world
    for parameter, (size, count) in zip(parameters, sizes, strict=True):
        held[partition.owner(parameter)] += 4 * size * count
    assert held == partition.loads
    assert max(held) <= sum(held) / world + max((4 * size * count for size, count in sizes), default=0)
