"""Laws of the picture sizes of a cache: which prompt has which, what a shard holds, and what a batch holds."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.values import PictureSize
from stages.cache.fill import ShardTask, tasks_in, tasks_of
from stages.cache.sizes import RenderSizes, SizeShare, size_of
from stages.cache.targets import RenderConfig, StatesConfig, make_records, recipe_of, records_from_pictures
from stages.nets.components import load_components
from stages.nets.latents import LatentGeometry
from stages.nets.teacher import Teacher
from stages.prompts import Prompt
from stages.system.refusal import Refused

SQUARE, WIDE, TALL = PictureSize(64, 64), PictureSize(96, 64), PictureSize(64, 96)
THREE = (SizeShare(size=SQUARE, share=0.4), SizeShare(size=WIDE, share=0.3), SizeShare(size=TALL, share=0.3))
SIZES = RenderSizes(SQUARE, THREE)
EMBEDDED = LatentGeometry(channels=4, native_side=8, factor=8)


def numbered(count: int) -> list[Prompt]:
    return [Prompt(f"star {i}", "star", 7919 * i) for i in range(count)]


def tasks(train: int, validation: int = 3, per_shard: int = 4) -> list[ShardTask]:
    return tasks_of({"train": numbered(train), "validation": numbered(validation)}, per_shard, 6, SIZES)


def test_sizes_come_as_often_as_their_shares_say() -> None:
    n = 4000
    counts = Counter(size_of(seed, THREE) for seed in range(n))
    for one in THREE:
        assert abs(counts[one.size] / n - one.share) < 3 * (one.share * (1 - one.share) / n) ** 0.5


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.integers(0, (1 << 63) - 1))
def test_shares_count_relative_to_their_sum(shares: list[float], seed: int) -> None:
    sizes = [PictureSize(8 * (i + 1), 64) for i in range(len(shares))]
    one, other = (
        [SizeShare(size=size, share=factor * share) for size, share in zip(sizes, shares, strict=True)]
        for factor in (1, 4)
    )
    assert size_of(seed, one) == size_of(seed, other)
    assert sum(entry["share"] for entry in RenderSizes(SQUARE, tuple(one)).identity()) == pytest.approx(1)


def test_shares_in_other_units_are_the_same_recipe() -> None:
    tens = tuple(replace_share(one, 10 * one.share) for one in THREE)
    assert RenderSizes(SQUARE, tens).identity() == SIZES.identity()


def replace_share(one: SizeShare, share: float) -> SizeShare:
    return one.model_copy(update={"share": round(share, 6)})


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 30), st.integers(1, 9))
def test_every_prompt_is_in_one_shard_of_its_size_under_its_number(train: int, validation: int, per_shard: int) -> None:
    made = tasks(train, validation, per_shard)
    for split, count in (("train", train), ("validation", validation)):
        own = [task for task in made if task.split == split]
        assert sorted(number for task in own for number in task.numbers) == list(range(count))
    for task in made:
        assert list(task.numbers) == sorted(task.numbers)
        assert [prompt.text for prompt in task.prompts] == [f"star {number}" for number in task.numbers]
        assert {SIZES.size_of(prompt) for prompt in task.prompts} == {task.size}
        assert 0 < len(task.prompts) <= per_shard
    assert len({task.name for task in made}) == len(made)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 20))
def test_a_longer_list_only_adds_shards_or_lengthens_the_last_of_a_size(train: int, more: int) -> None:
    before, after = tasks(train), {task.name: task for task in tasks(train + more)}
    last = {(task.split, task.size): task.name for task in before}
    for task in before:
        longer = after[task.name]
        assert list(longer.numbers)[: len(task.numbers)] == list(task.numbers)
        if last[task.split, task.size] != task.name:
            assert longer == task


def test_shards_are_numbered_through_splits_and_sizes() -> None:
    made = tasks(40, 10)
    assert tasks_in(made, f"2:{len(made)}") == made[2:]
    assert [task.split for task in made] == sorted((task.split for task in made), key=["train", "validation"].index)
    with pytest.raises(Refused, match=f"END <= {len(made)}"):
        tasks_in(made, f"0:{len(made) + 1}")


@pytest.mark.parametrize(
    ("size", "expected"), [("64x64", 50), ("96x64", 33), ("128x128", 12), ("256x256", 3), ("64x32", 100)]
)
def test_a_batch_has_as_many_pixels_at_each_size(size: str, expected: int) -> None:
    assert SIZES.batch_prompts(50, PictureSize.parse(size)) == expected
    assert SIZES.batch_prompts(1, PictureSize.parse(size)) == max(1, expected // 50)


def test_one_size_gives_the_shards_that_there_were_without_sizes() -> None:
    made = tasks_of({"train": numbered(9)}, 4, 6, RenderSizes(SQUARE))
    assert [(task.name, list(task.numbers), task.batch_size) for task in made] == [
        ("train-000000", [0, 1, 2, 3], 6),
        ("train-000001", [4, 5, 6, 7], 6),
        ("train-000002", [8], 6),
    ]


def test_the_native_size_alone_is_the_same_as_no_list() -> None:
    assert RenderSizes.checked([SizeShare(size=SQUARE, share=2)], EMBEDDED) == RenderSizes(SQUARE)
    assert RenderSizes.checked([SizeShare(size=WIDE, share=2)], EMBEDDED).listed == (WIDE,)


@pytest.mark.parametrize("sizes", [["64x64", "64x64"], ["64x96", "96x64", "64x96"]])
def test_a_size_that_is_listed_twice_is_refused(sizes: list[str]) -> None:
    with pytest.raises(ValidationError, match=f"{sizes[0]} is listed 2 times"):
        RenderConfig.model_validate({"sizes": [{"size": size, "share": 1} for size in sizes]})


@pytest.mark.parametrize("share", [0, -1, float("inf"), float("nan")])
def test_a_share_that_is_not_positive_is_refused(share: float) -> None:
    with pytest.raises(ValidationError, match="share"):
        RenderConfig.model_validate({"sizes": [{"size": "64x64", "share": share}]})


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(load_components("stages/tiny/model", torch.device("cpu"), torch.float32), "hold")


STATES = StatesConfig(steps=3, trajectory_states=2, renoised_states=1)


@pytest.mark.parametrize("size", [WIDE, TALL, PictureSize(80, 80)])
def test_a_record_has_the_latents_of_its_size_and_the_features_of_any(teacher: Teacher, size: PictureSize) -> None:
    record, square = (
        make_records(teacher, numbered(2), ["000000000", "000000001"], STATES, each)[1] for each in (size, None)
    )
    latent = (4, size.height // 8, size.width // 8)
    assert record.size == size
    assert tuple(record.x0.shape) == latent
    assert tuple(record.states.v_cond.shape) == (3, *latent)
    assert record.guidance_scale == square.guidance_scale
    for block, values in square.features.by_block.items():
        assert record.features.by_block[block].shape == values.shape


def test_records_of_pictures_have_the_size_of_their_latents(teacher: Teacher) -> None:
    record = records_from_pictures(teacher, numbered(1), ["000000000"], torch.randn(1, 4, 12, 8), STATES)[0]
    assert record.size == TALL
    assert tuple(record.states.x_s.shape) == (3, 4, 12, 8)


def test_a_recipe_without_other_sizes_names_none(teacher: Teacher) -> None:
    def identity(*sizes: str) -> dict:
        shares = tuple(SizeShare(size=size, share=1) for size in sizes)
        return recipe_of(teacher, RenderConfig(sizes=shares), {}).identity["render"]

    assert identity() == identity("64x64")
    assert "sizes" not in identity()
    assert identity("64x64", "96x64")["sizes"] == [{"size": "64x64", "share": 0.5}, {"size": "96x64", "share": 0.5}]
    with pytest.raises(Refused, match=r"render.sizes: 100x64: .* multiples of 8 pixels - take 104x64 or 96x64"):
        identity("100x64")
