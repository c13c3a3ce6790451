"""Laws of the training for few steps: resume, processes and micro-batches, on the embedded network."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shards.batch import Batch
from shards.reader import Reader
from stages.fast.rows import RowShares, WindowRows
from stages.fast.validation import WindowValidation
from stages.nets.components import load_components
from stages.nets.guidance import embed_guidance
from stages.nets.student import Student
from stages.train.loop import fit
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.runtime import Runtime
from stages.train.setup import TrainConfig
from tests.fast.runs import CONFIG, FEW_PROMPTS

CPU = torch.device("cpu")
OBJECTIVE = ObjectiveConfig(uncond_weight=0, guidance_weight=0, block_weight=0, block_weights={})
TRAIN = {
    "max_samples": 16,
    "batch_size": 4,
    "optimizer": {"kind": "muon", "learning_rate": 1e-3, "warmup_samples": 4},
    "journal_every_samples": 4,
    "checkpoint_every_samples": 8,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stages import __main__ as cli

    run = tmp_path_factory.mktemp("cached") / "run"
    assert cli.main(["cache-teacher", *CONFIG, "--run", str(run), *FEW_PROMPTS]) == 0
    return run / "cache"


def rows(cache: Path, rank: int = 0, world: int = 1, windows: int = 2) -> WindowRows:
    reader = Reader(cache, "train", 0, 4 // world, rank=rank, world=world, landings=True)
    return WindowRows(reader, windows, RowShares(0.5), 0)


def train(cache: Path, folder: Path, until: int | None = None, changes: Mapping[str, Any] | None = None) -> Student:
    """A training of 16 samples, interrupted before sample `until`."""

    def batches(first: int) -> Iterator[Batch]:
        for number, batch in enumerate(rows(cache).batches(first)):
            if until is not None and first + 4 * number >= until:
                raise InterruptedError
            yield batch

    unet = load_components("stages/tiny/model", CPU, torch.float32).unet
    return fit(
        Student.from_teacher(embed_guidance(unet)),
        Objective(OBJECTIVE, ()),
        batches,
        torch.zeros(1, 24, 64),
        TrainConfig.model_validate({**TRAIN, **(changes or {})}),
        folder,
        runtime=Runtime(CPU),
        identity={"windows": 2},
    )


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train(cache, tmp_path_factory.mktemp("whole")).state_dict()


@pytest.mark.parametrize("until", [4, 12])
def test_a_run_that_is_resumed_ends_with_the_same_bits(
    cache: Path, whole: dict[str, Tensor], tmp_path: Path, until: int
) -> None:
    with pytest.raises(InterruptedError):
        train(cache, tmp_path, until)
    resumed = train(cache, tmp_path).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_micro_batches_are_the_same_but_for_rounding(cache: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    parts = train(cache, tmp_path, changes={"accumulate": 2}).state_dict()
    for name, value in parts.items():
        torch.testing.assert_close(value, whole[name], atol=1e-4, rtol=1e-3)


def test_processes_share_the_rows_of_one(cache: Path) -> None:
    for first in (0, 8):
        one = next(rows(cache).batches(first))
        shared = [next(rows(cache, rank, 2).batches(first)) for rank in (0, 1)]
        for rank, batch in enumerate(shared):
            assert torch.equal(batch.x_s, one.x_s[rank::2])
            assert torch.equal(batch.v_cond, one.v_cond[rank::2])
            assert torch.equal(batch.s, one.s[rank::2])


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_rows_of_the_cache_are_in_the_windows(cache: Path, windows: int) -> None:
    batches = rows(cache, windows=windows).batches(0)
    for _ in range(6):
        batch = next(batches)
        assert bool(((batch.s > 0) & (batch.s <= 0.9991)).all())
        assert batch.guidance_scale is not None
        assert bool(((batch.guidance_scale >= 3) & (batch.guidance_scale <= 8)).all())
        assert bool(batch.v_cond.isfinite().all())
        assert float(batch.v_cond.square().mean().sqrt()) < 5, "an average velocity, not rounding over a short time"


class Exact(torch.nn.Module):
    """In place of a student: the velocity that lands, of the validation's own rows."""

    embeds_guidance = True

    def __init__(self, validation: WindowValidation) -> None:
        super().__init__()
        self.known = {
            row.numpy().tobytes(): v for b in validation._rows for row, v in zip(b.x_s, b.v_cond, strict=True)
        }

    def velocity(self, x: Tensor, s: Tensor, cond: Tensor, guidance: Tensor) -> Tensor:
        return torch.stack([self.known.get(row.numpy().tobytes(), torch.zeros_like(row)) for row in x])


def test_a_student_that_lands_has_no_error_and_one_that_stands_still_the_whole(cache: Path) -> None:
    reader = Reader(cache, "validation", 0, landings=True)
    validation = WindowValidation(reader, 2, 12, RowShares(1.0), CPU)
    exact: Any = Exact(validation)
    still: Any = Exact(validation)
    still.known = {}
    landed, stood = validation(exact), validation(still)
    assert landed is not None
    assert stood is not None
    assert landed.landing == 0
    assert stood.landing == pytest.approx(1)
    assert len(landed.landing_by_s) == 2
    assert stood.end > 0.5
    assert WindowValidation(reader, 2, 0, RowShares(1.0), CPU)(exact) is None
