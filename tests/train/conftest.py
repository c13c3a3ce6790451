"""A student of a few dozen weights, and an endless stream of batches that are a function of the sample number."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shards.batch import Batch
from stages.nets.student import Prediction, Student
from stages.train.loop import fit
from stages.train.losses import FeatureScale
from stages.train.objective import Objective, ObjectiveConfig
from stages.train.runtime import Runtime
from stages.train.setup import TrainConfig

BLOCKS = ("mid", "up_3")


class Toy(nn.Module):
    """A small student: one convolution, conditioned on time and prompt."""

    embeds_guidance = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1)
        self.condition = nn.Linear(7, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def velocity(self, x: Tensor, s: Tensor, cond: Tensor) -> Tensor:
        bias = self.condition(torch.cat([cond.mean(dim=1), s[:, None]], dim=1))
        return self.conv(x) + bias[:, :, None, None]

    def forward(self, x: Tensor, s: Tensor, cond: Tensor, uncond: Tensor) -> Prediction:
        v_cond, v_uncond = self.velocity(x, s, cond), self.velocity(x, s, uncond.expand_as(cond))
        pooled = v_cond.mean(dim=(2, 3))
        return Prediction(v_cond, v_uncond, {"mid": pooled, "up_3": 2 * pooled})


def make_batch(first: int, size: int = 2) -> Batch:
    """Samples `first` to `first + size - 1`, each from its own seed."""
    rows = []
    for index in range(first, first + size):
        generator = torch.Generator().manual_seed(index)
        shapes = ((5, 6), (3, 4, 5), (3, 4, 5), (3, 4, 5), (3,), (3,))
        rows.append(
            [torch.randn(shape, generator=generator) for shape in shapes] + [torch.rand((), generator=generator)]
        )
    cond, x_s, v_cond, v_uncond, mid, up_3, s = (torch.stack(column) for column in zip(*rows, strict=True))
    return Batch(
        keys=tuple(f"{index:09d}" for index in range(first, first + size)),
        texts=("a star",) * size,
        class_names=("shape/star",) * size,
        cond=cond.half(),
        x_s=x_s.half(),
        v_cond=v_cond.half(),
        v_uncond=v_uncond.half(),
        s=s,
        k=(s * 999).long(),
        features={"mid": mid.half(), "up_3": up_3.half()},
        state_index=torch.zeros(size, dtype=torch.int64),
    )


def stream(first: int) -> Iterator[Batch]:
    while True:
        yield make_batch(first)
        first += 2


SCALE = FeatureScale({block: torch.full((1, 3), 0.5) for block in BLOCKS})
CONFIG = TrainConfig.model_validate(
    {
        "max_samples": 24,
        "batch_size": 2,
        "optimizer": {"learning_rate": 0.01, "warmup_samples": 4},
        "ema": {"half_life_samples": 6, "ramp_ratio": 0.5},
        "journal_every_samples": 4,
        "checkpoint_every_samples": 8,
        "keep": {"last": 10},
    }
)


def interrupted_stream(after: int) -> Callable[[int], Iterator[Batch]]:
    """The stream, interrupted before sample `after`."""

    def batches(first: int) -> Iterator[Batch]:
        for batch in stream(first):
            if int(batch.keys[0]) >= after:
                raise InterruptedError
            yield batch

    return batches


@pytest.fixture
def train() -> Callable[..., Any]:
    """Run `fit` on the toy; with CONFIG unless changed."""

    def run(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> Student:
        options = {
            "student": Toy(),
            "objective": Objective(ObjectiveConfig(), BLOCKS, SCALE),
            "batches": stream,
            "uncond": torch.zeros(1, 5, 6),
            "runtime": Runtime(torch.device("cpu")),
            "identity": {"recipe": {"teacher": "abc"}},
            **options,
        }
        config = TrainConfig.model_validate({**CONFIG.model_dump(), **(changes or {})})
        return fit(folder=folder, config=config, **options)

    return run


@pytest.fixture
def toy() -> nn.Module:
    return Toy()


@pytest.fixture
def power_cut() -> Callable[[int], Callable[[int], Iterator[Batch]]]:
    return interrupted_stream


@pytest.fixture
def batches_with_nan() -> Callable[[int], Iterator[Batch]]:
    """The stream, with one broken sample: number 13."""

    def batches(first: int) -> Iterator[Batch]:
        for batch in stream(first):
            if "000000013" in batch.keys:
                v_cond = batch.v_cond.clone()
                v_cond[1, 0, 0, 0] = float("nan")
                batch = replace(batch, v_cond=v_cond)
            yield batch

    return batches


@pytest.fixture
def unet_batches() -> Callable[[int | None], Callable[[int], Iterator[Batch]]]:
    """Batches for the embedded UNet, interrupted before sample `after`."""

    def until(after: int | None) -> Callable[[int], Iterator[Batch]]:
        def batches(first: int) -> Iterator[Batch]:
            for batch in (interrupted_stream(after) if after else stream)(first):
                generator = torch.Generator().manual_seed(int(batch.keys[0]))
                x_s, v_cond, v_uncond = torch.randn(3, 2, 4, 8, 8, generator=generator)
                cond = torch.randn(2, 3, 64, generator=generator)
                yield replace(batch, x_s=x_s, v_cond=v_cond, v_uncond=v_uncond, cond=cond, features={})

        return batches

    return until


@pytest.fixture
def batch() -> Batch:
    return make_batch(0).to("cpu", torch.float32)
