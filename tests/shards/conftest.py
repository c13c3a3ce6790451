"""Small records that are a function of their number, and caches made of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.values import PictureSize
from shards.manifest import Recipe
from shards.record import LANDINGS_SCHEMA, BlockFeatures, Landings, Record, States
from shards.writer import CacheWriter

C, H, W, K = 3, 4, 5, 2
CLASSES = ("shape/star", "shape/disc", "shape/ring")


def make_numbered_record(number: int, state_count: int = K) -> Record:
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
        states=States(
            k=torch.randint(0, 1000, (state_count,), generator=generator),
            s=torch.rand(state_count, generator=generator),
            x_s=half(state_count, C, H, W),
            v_cond=half(state_count, C, H, W),
            v_uncond=half(state_count, C, H, W),
            trajectory=torch.arange(state_count) == 0,
        ),
        features=BlockFeatures({"mid": half(state_count, 8), "down_0": half(state_count, 3)}),
        size=PictureSize(8 * W, 8 * H),
    )


def make_small_recipe() -> Recipe:
    return Recipe(identity={"sampling": {"steps": 25, "guidance": 5.0}}, information={"torch": "2"})


def fill_cache(folder: Path) -> Path:
    """Two training shards of four and three records, and one of two for validation."""
    writer = CacheWriter(folder, make_small_recipe())
    for split, index, numbers in (
        ("train", 0, range(4)),
        ("train", 1, range(4, 7)),
        ("validation", 0, range(100, 102)),
    ):
        if not writer.is_intact(split, index, len(numbers)):
            writer.add(split, index, (make_numbered_record(number) for number in numbers))
    return folder


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return make_numbered_record


@pytest.fixture
def make_recipe() -> Callable[[], Recipe]:
    return make_small_recipe


@pytest.fixture
def make_cache() -> Callable[[Path], Path]:
    return fill_cache


@pytest.fixture(scope="session")
def make_module_cache() -> Callable[[Path], Path]:
    return fill_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return fill_cache(tmp_path / "run" / "cache")


SIZES = (PictureSize(40, 32), PictureSize(24, 48), PictureSize(48, 24))


def make_sized_record(number: int, size: PictureSize, state_count: int = K) -> Record:
    """Record `number` with a picture of this size."""
    record = make_numbered_record(number, state_count)
    generator = torch.Generator().manual_seed(10**6 + number)
    shape = (C, size.height // 8, size.width // 8)
    states = {
        name: torch.randn(state_count, *shape, generator=generator).half() for name in ("x_s", "v_cond", "v_uncond")
    }
    x0 = torch.randn(shape, generator=generator).half()
    return replace(record, x0=x0, states=replace(record.states, **states), size=size)


TIMES = (1.0, 0.75, 0.5, 0.25)
"""Of the landings of the records below."""


def with_landings(record: Record, times: Sequence[float] = TIMES) -> Record:
    """The same record with landings at these times, whose values are a function of its number."""
    generator = torch.Generator().manual_seed(10**7 + int(record.key))
    x = torch.randn(len(times), *record.x0.shape, generator=generator).half()
    return replace(record, landings=Landings(torch.tensor(times), x))


def fill_landed_cache(folder: Path, several_sizes: bool = False) -> Path:
    """A cache of schema 3: the records of `fill_cache`, or six of two sizes, with landings."""
    writer = CacheWriter(folder, make_small_recipe().in_schema(LANDINGS_SCHEMA))
    if several_sizes:
        for size, numbers in ((SIZES[0], (0, 2, 4)), (SIZES[1], (1, 3, 5))):
            writer.add("train", 0, (with_landings(make_sized_record(n, size)) for n in numbers), size=size)
        return folder
    for split, index, numbers in (
        ("train", 0, range(4)),
        ("train", 1, range(4, 7)),
        ("validation", 0, range(100, 102)),
    ):
        writer.add(split, index, (with_landings(make_numbered_record(number)) for number in numbers))
    return folder


def size_of_number(number: int) -> PictureSize:
    """Of seven prompts three have the first size, and two each of the others."""
    return SIZES[(0, 1, 0, 2, 0, 1, 2)[number % 7]]


def fill_sized_cache(folder: Path, train: int = 14, validation: int = 4, per_shard: int = 3) -> Path:
    """A cache of three sizes in shards of up to three records; a prompt's number is its key in any size."""
    writer = CacheWriter(folder, make_small_recipe())
    for split, count in (("train", train), ("validation", validation)):
        for size in SIZES:
            numbers = [number for number in range(count) if size_of_number(number) == size]
            for index, first in enumerate(range(0, len(numbers), per_shard)):
                own = numbers[first : first + per_shard]
                base = 0 if split == "train" else 100
                if not writer.is_intact(split, index, len(own), size):
                    records = (replace(make_sized_record(base + n, size), key=f"{n:09d}") for n in own)
                    writer.add(split, index, records, size=size)
    return folder


@pytest.fixture(scope="session")
def make_sized_cache() -> Callable[..., Path]:
    return fill_sized_cache


@pytest.fixture
def sized(tmp_path: Path) -> Path:
    return fill_sized_cache(tmp_path / "run" / "cache")
