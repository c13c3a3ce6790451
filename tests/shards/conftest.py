"""Small records that are a function of their number, and caches made of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shards.manifest import Recipe
from shards.record import BlockFeatures, Draws, Record
from shards.writer import CacheWriter

C, H, W, K = 3, 4, 5, 2
CLASSES = ("shape/star", "shape/disc", "shape/ring")


def record(number: int, draws: int = K) -> Record:
    """Record `number` of a split, with values that no other has."""
    generator = torch.Generator().manual_seed(number)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    return Record(
        key=f"{number:09d}",
        text=f"a star, number {number}",
        class_name=CLASSES[number % 3],
        seed=2**62 + number,
        guidance_scale=3.0 + number,
        cond=half(6, 7),
        x0=half(C, H, W),
        draws=Draws(
            k=torch.randint(0, 1000, (draws,), generator=generator),
            s=torch.rand(draws, generator=generator),
            x_t=half(draws, C, H, W),
            v_cond=half(draws, C, H, W),
            v_uncond=half(draws, C, H, W),
            trajectory=torch.arange(draws) == 0,
        ),
        features=BlockFeatures({"mid": half(draws, 8), "down_0": half(draws, 3)}),
    )


def recipe() -> Recipe:
    return Recipe(identity={"sampling": {"steps": 25, "guidance": 5.0}}, information={"torch": "2"})


def fill(folder: Path) -> Path:
    """Two training shards of four and three records, and one of two for validation."""
    writer = CacheWriter(folder, recipe())
    for split, index, numbers in (
        ("train", 0, range(4)),
        ("train", 1, range(4, 7)),
        ("validation", 0, range(100, 102)),
    ):
        if not writer.has(split, index, len(numbers)):
            writer.add(split, index, (record(number) for number in numbers))
    return folder


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return record


@pytest.fixture
def make_recipe() -> Callable[[], Recipe]:
    return recipe


@pytest.fixture
def make_cache() -> Callable[[Path], Path]:
    return fill


@pytest.fixture(scope="session")
def make_module_cache() -> Callable[[Path], Path]:
    return fill


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill(tmp_path / "run" / "cache")
