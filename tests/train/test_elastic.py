"""A run goes on with another number of processes: the same samples in the same order, each of an epoch once."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import forge
from configs.values import PictureSize
from shards.batch import Batch
from shards.manifest import Recipe
from shards.reader import Reader
from shards.writer import CacheWriter
from stages.system.ownership import CLAIM_FILE, claim_folder, process_token, refuse_claimed
from stages.system.refusal import Refused
from stages.train.loop import fit
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.runtime import Runtime
from stages.train.step import TrainingStep
from tests.train.conftest import BLOCKS, CONFIG, SCALE, Toy
from tests.train.test_david import run_processes

BATCH, LAST = 4, 60
TERM, KILL = signal.SIGTERM, signal.SIGKILL


class Narrow(Toy):
    """The toy, for the prompts of the forged records."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = torch.nn.Linear(4, 3)
        torch.nn.init.constant_(self.condition.weight, 0.1)
        torch.nn.init.zeros_(self.condition.bias)


def make_cache(folder: Path, shapes: list[tuple[int, ...]]) -> Path:
    """Three shards of three records of two states for each shape."""
    writer = CacheWriter(folder, Recipe(identity={"steps": 25}))
    for place, shape in enumerate(shapes):
        for index in range(3):
            first = 9 * place + 3 * index
            records = [forge.record(number, shape, 2, BLOCKS) for number in range(first, first + 3)]
            size = PictureSize(8 * shape[2], 8 * shape[1]) if len(shapes) > 1 else None
            writer.add("train", index, records, size=size)
    return folder


def train(cache: Path, folder: Path, signal_at: tuple[int, int, signal.Signals] | None = None) -> None:
    """Train the toy on a cache; each process appends to a file of its own what it has made a step of.

    Process `signal_at[1]` gets a signal before its step number `signal_at[0]`.
    """
    runtime, true = Runtime(torch.device("cpu")), TrainingStep.__call__
    folder.mkdir(exist_ok=True)

    def recording(step: TrainingStep, batch: Batch, wait: float) -> Any:
        before, rank, world = step.state.samples, runtime.rank, runtime.world
        result = true(step, batch, wait)
        rows = enumerate(zip(batch.keys, batch.state_index.tolist(), strict=True))
        with open(folder / f"steps-{world}-{rank}", "a") as file:
            file.writelines(f"{json.dumps([before + rank + i * world, *row])}\n" for i, row in rows)
        return result

    def batches(first: int) -> Iterator[Batch]:
        for number, batch in enumerate(reader.batches(first), first // BATCH):
            if signal_at is not None and signal_at[:2] == (number, runtime.rank):
                signal.raise_signal(signal_at[2])
            yield batch

    reader = Reader(cache, "train", 0, BATCH // runtime.world, rank=runtime.rank, world=runtime.world)
    TrainingStep.__call__ = recording  # type: ignore[method-assign]  # of a forked process
    changes = {"batch_size": BATCH, "max_samples": LAST}
    fit(
        Narrow(),  # type: ignore[arg-type]
        Objective(ObjectiveConfig(), BLOCKS, SCALE),
        batches,
        torch.zeros(1, 2, 3),
        type(CONFIG).model_validate({**CONFIG.model_dump(), **changes}),
        folder,
        runtime=runtime,
        identity={},
    )
    runtime.close()


def trained_samples(folder: Path, world: int, first: int, end: int) -> list[tuple[int, str, int]]:
    """Number, record and state of the samples in this range that the processes of a group trained on."""
    lines = [line for path in folder.glob(f"steps-{world}-*") for line in path.read_text().splitlines()]
    return [row for row in sorted(tuple(json.loads(line)) for line in lines) if first <= row[0] < end]


def newest(folder: Path) -> int:
    return max(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("shapes", [[(3, 4, 5)], [(3, 4, 5), (3, 6, 5)]])
def test_one_then_two_then_four_then_one_process_train_in_the_order_of_one(
    tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    cache, whole, folder = make_cache(tmp_path / "cache", shapes), tmp_path / "whole", tmp_path / "elastic"
    assert run_processes(partial(train, cache, whole), 1) == [0]

    began, trained = 0, []
    for world, ending in [(1, KILL), (2, TERM), (4, KILL)]:  # what was done after the last checkpoint is lost
        signal_at = (began // BATCH + 3, world - 1, ending)
        assert 0 not in run_processes(partial(train, cache, folder, signal_at=signal_at), world)
        assert began < newest(folder) < LAST
        assert (newest(folder) == BATCH * (signal_at[0] + 1)) == (ending == TERM)
        trained += trained_samples(folder, world, began, newest(folder))
        began = newest(folder)
    (folder / "steps-1-0").unlink()
    assert run_processes(partial(train, cache, folder), 1) == [0]
    trained += trained_samples(folder, 1, began, LAST)

    reader = Reader(cache, batch_size=BATCH)
    records, states = reader.order.at(np.arange(LAST))
    order = [(n, reader.record_at(int(record)).key, int(states[n])) for n, record in enumerate(records)]
    assert trained == order == trained_samples(whole, 1, 0, LAST)
    if len(shapes) == 1:
        epoch = reader.samples_per_epoch
        assert epoch % BATCH
        for first in range(0, LAST - epoch, epoch):
            assert set(Counter(row[1:] for row in trained[first : first + epoch]).values()) == {1}
    ends = [load_file(place / "checkpoints" / f"{LAST:09d}" / "student.safetensors") for place in (whole, folder)]
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("claimed_by", "run", "is_taken"),
    [("job7", "job7", True), ("job7", "job8", False), ("", "", False), ("none", "none", False), (None, "job7", False)],
)
def test_a_run_whose_main_process_moves_to_another_machine_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claimed_by: str | None, run: str, is_taken: bool
) -> None:
    claim = {"owner": "12-3@elsewhere", "process": 12, "host": "elsewhere", "machine": "m", "boot": "b"}
    (tmp_path / CLAIM_FILE).write_text(json.dumps(claim | ({} if claimed_by is None else {"run": claimed_by})))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
    with nullcontext() if is_taken else pytest.raises(Refused, match="process 12 on elsewhere claims it"):
        refuse_claimed(tmp_path, "train in")
        with claim_folder(tmp_path, "train in"):
            assert json.loads((tmp_path / CLAIM_FILE).read_text())["owner"] == process_token()
