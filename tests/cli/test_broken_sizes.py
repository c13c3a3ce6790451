"""Picture sizes that cannot be, through the real commands: each is refused in one line, with the sizes that can."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages import __main__ as cli

FEW = ["--count", "12", "--validation-count", "6", "--render.records-per-shard", "6", "--render.batch-size", "6"]
FEW += ["--render.states.steps", "3", "--render.states.trajectory-states", "2", "--render.states.renoised-states", "1"]
THREE = "[{size: 64x64, share: 2}, {size: 64x96, share: 1}, {size: 96x64, share: 1}]"
FAST = ["--config", "configs/tiny.yaml", "--train.max-samples", "16", "--validation.states", "4"]


def caching(run: Path, *options: str) -> list[str]:
    return ["cache-teacher", "--config", "configs/tiny.yaml", "--run", str(run), *FEW, *options]


SIZES = {
    "no multiple of the unit": ("[{size: 100x64, share: 1}]", ["render.sizes", "100x64", "96x64", "104x64"]),
    "a side of no multiple": ("[{size: 64x64, share: 1}, {size: 64x97, share: 1}]", ["64x97", "64x96", "64x104"]),
    "too long": ("[{size: 64x264, share: 1}]", ["render.sizes", "64x264", "256", "64x256"]),
    "far too long": ("[{size: 99999x99999, share: 1}]", ["99999x99999", "256x256"]),
    "below the unit": ("[{size: 4x64, share: 1}]", ["render.sizes", "4x64", "8x64"]),
    "listed twice": ("[{size: 64x96, share: 1}, {size: 64x96, share: 2}]", ["render.sizes", "64x96", "2 times"]),
    "no share": ("[{size: 64x64}]", ["sizes", "share"]),
    "a share of nothing": ("[{size: 64x64, share: 0}]", ["share", "0"]),
    "a negative share": ("[{size: 64x64, share: -.3}]", ["share = -.3"]),
    "an infinite share": ("[{size: 64x64, share: .inf}]", ["share", "inf"]),
    "a share that is no number": ("[{size: 64x64, share: half}]", ["share", "half"]),
    "a size that is no text": ("[{size: 64, share: 1}]", ["size", "64", "WIDTHxHEIGHT"]),
    "one side": ("[{size: 64x, share: 1}]", ["64x", "WIDTHxHEIGHT"]),
    "three sides": ("[{size: 64x64x3, share: 1}]", ["64x64x3", "WIDTHxHEIGHT"]),
    "no side": ("[{size: 00x64, share: 1}]", ["00x64", "WIDTHxHEIGHT"]),
    "a number in YAML": ("[{size: 0x64, share: 1}]", ["100", "WIDTHxHEIGHT"]),
    "a sign": ("[{size: -64x64, share: 1}]", ["-64x64", "WIDTHxHEIGHT"]),
    "another key": ("[{size: 64x64, share: 1, count: 3}]", ["count"]),
    "no list": ("64x64", ["sizes"]),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_size_that_cannot_be_rendered_is_refused(refused: Callable[..., str], tmp_path: Path, case: str) -> None:
    text, named = SIZES[case]
    refused(caching(tmp_path / "run", "--render.sizes", text), *named)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a cache of three sizes."""
    run = tmp_path_factory.mktemp("sizes")
    assert cli.main(caching(run, "--render.sizes", THREE)) == 0
    return run


OTHER_RECIPES = {
    "no sizes": [],
    "one size": ["--render.sizes", "[{size: 64x96, share: 1}]"],
    "other shares": ["--render.sizes", THREE.replace("share: 2", "share: 3")],
    "another order": ["--render.sizes", "[{size: 64x96, share: 1}, {size: 64x64, share: 2}, {size: 96x64, share: 1}]"],
}


@pytest.mark.parametrize("case", OTHER_RECIPES)
def test_a_cache_of_other_sizes_is_another_cache(refused: Callable[..., str], cached: Path, case: str) -> None:
    refused(caching(cached, *OTHER_RECIPES[case]), "made by another recipe", "render.sizes", below=cached)


def test_fewer_prompts_than_there_are_is_refused(refused: Callable[..., str], cached: Path) -> None:
    fewer = [*caching(cached, "--render.sizes", THREE), "--count", "7"]
    refused(fewer, "holds 12 train prompts, 7 are asked for", below=cached)


def test_a_range_beyond_the_shards_of_all_sizes_is_refused(refused: Callable[..., str], cached: Path) -> None:
    refused(caching(cached, "--render.sizes", THREE, "--shard-range", "0:99"), "0:99", "END <=", below=cached)


# 40,000 pixels are 9 rows of 64x64 and 6 of the others.
BATCHES = {
    "rows that two micro-batches cannot share": (
        ["--train.batch-pixels", "40000", "--train.accumulate", "2"],
        ["train.batch_pixels = 40000", "9 rows of 64x64, 6 of 64x96", "take 40960"],
    ),
    "one row too many": (
        ["--train.batch-pixels", "12288", "--train.accumulate", "2"],
        ["train.batch_pixels = 12288", "3 rows of 64x64, 2 of 64x96", "take 16384"],
    ),
    "rows that two processes cannot share": (
        ["--train.batch-pixels", "6144", "--processes", "2"],
        ["processes = 2", "train.batch_pixels = 6144", "1 row of 64x64, 1 of 64x96", "take 16384"],
    ),
    "no pixels": (["--train.batch-pixels", "0"], ["batch_pixels", "0"]),
    "a size that the cache has not": (["--view.size", "80x80"], ["80x80 (view.size)", "take 64x64, 64x96, 96x64"]),
    "a view of no size": (["--view.size", "portrait"], ["portrait", "WIDTHxHEIGHT"]),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_cannot_be_split_is_refused(refused: Callable[..., str], cached: Path, case: str) -> None:
    options, named = BATCHES[case]
    refused(["distill", "--run", str(cached), *FAST, *options], *named, below=cached)
