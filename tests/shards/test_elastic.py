"""The stream is one, however many ranks and threads read it and wherever they begin."""

import itertools
from collections import Counter

import numpy as np
import pytest

from shards.reader import Reader
from shards.stream import order as order_module
from shards.stream.order import WINDOW, Epoch, Pairs, ShuffledOrder, epoch_order

EVERYTHING = Counter((f"{number:09d}", state) for number in range(7) for state in range(2))


def batches_by_number(folder, rank, world, start, stop, workers, batch_size=3):
    """Sample number -> (key, state) for what one rank reads of the samples from start to stop."""
    reader = Reader(folder, batch_size=batch_size, rank=rank, world=world, workers=workers, memory_budget_bytes=0)
    numbers = itertools.count(start + (rank - start) % world, world)
    pairs = (
        pair for batch in reader.batches(start) for pair in zip(batch.keys, batch.state_index.tolist(), strict=True)
    )
    return dict(itertools.takewhile(lambda one: one[0] < stop, zip(numbers, pairs, strict=False)))


@pytest.fixture
def several_windows(monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", 1)
    epoch_order.cache_clear()
    yield
    epoch_order.cache_clear()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_an_epoch_is_the_whole_split_for_any_ranks_and_workers(cache, world, workers, several_windows):
    for epoch in (0, 2):
        ranks = [batches_by_number(cache, rank, world, 14 * epoch, 14 * epoch + 14, workers) for rank in range(world)]
        assert Counter(pair for rank in ranks for pair in rank.values()) == EVERYTHING


@pytest.mark.parametrize(("before", "after"), [((1, 0), (1, 3)), ((2, 3), (3, 0)), ((3, 1), (1, 1)), ((5, 0), (2, 3))])
@pytest.mark.parametrize("left", [6, 14, 17])
def test_a_resumed_stream_is_the_uninterrupted_one(cache, before, after, left, several_windows):
    whole = batches_by_number(cache, 0, 1, 0, 40, 0)
    resumed = {}
    for (world, workers), start, stop in ((before, 0, left), (after, left, 40)):
        for rank in range(world):
            resumed |= batches_by_number(cache, rank, world, start, stop, workers, batch_size=4)
    assert resumed == whole


def test_an_error_comes_where_its_batch_would_have_come(cache):
    shard = Reader(cache).shards[1]
    with open(cache / shard.file, "r+b") as tar:
        tar.write(b"\x55")
    reader = Reader(cache, batch_size=1, workers=3, memory_budget_bytes=0)
    first_bad = next(n for n in range(14) if reader.order.at(np.array([n]))[0][0] >= 4)
    batches = reader.batches()
    assert [next(batches).keys[0] for _ in range(first_bad)] == [
        Reader(cache).record_at(int(reader.order.at(np.array([n]))[0][0])).key for n in range(first_bad)
    ]
    with pytest.raises(Exception, match=r"train-000001\.tar: sha256"):
        next(batches)


SIZES = tuple(5 + number % 3 for number in range(2 * WINDOW + 3))


def shards_of_windows(epoch):
    """The shards that each window of an epoch touches."""
    order = epoch_order(3, epoch, SIZES)
    shard_of = np.searchsorted(np.cumsum(SIZES), order.at(np.arange(sum(SIZES))), side="right")
    return tuple(frozenset(shard_of[first:last].tolist()) for first, last in itertools.pairwise(order.starts))


@pytest.mark.parametrize("epoch", [0, 1, 9])
def test_windows_make_a_permutation_and_touch_few_shards(epoch):
    numbers = epoch_order(3, epoch, SIZES).at(np.arange(sum(SIZES)))
    assert sorted(numbers.tolist()) == list(range(sum(SIZES)))
    windows = shards_of_windows(epoch)
    assert len(windows) == 3
    assert all(len(shards) <= WINDOW for shards in windows)
    assert sorted(itertools.chain(*windows)) == list(range(len(SIZES)))


def test_shards_meet_in_other_windows_in_other_epochs():
    assert len({shards_of_windows(epoch) for epoch in range(4)}) == 4


def test_a_split_of_one_window_is_permuted_uniformly():
    firsts = [Epoch(seed, 0, (2, 3, 1)).at(np.arange(6)) for seed in range(3000)]
    counts = np.stack([np.bincount(places, minlength=6) for places in np.stack(firsts, axis=1)])
    assert (abs(counts - 500) < 4.5 * np.sqrt(3000 / 6 * 5 / 6)).all()


def test_a_far_sample_costs_one_window(monkeypatch):
    sizes = []
    true = order_module.permutation
    monkeypatch.setattr(order_module, "permutation", lambda key, n: sizes.append(n) or true(key, n))
    stream = ShuffledOrder(11, Pairs(np.full(len(SIZES), 6), [1] * len(SIZES)))
    stream.at(np.array([10**15]))
    assert len(sizes) == 2  # the shards, and the samples of one window
    assert sum(sizes) <= len(SIZES) + 6 * WINDOW
